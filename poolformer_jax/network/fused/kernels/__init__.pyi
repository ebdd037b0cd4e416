from .base import Kernels as Kernels, Pass as Pass
from .choice import GpuKernels as GpuKernels, TpuKernels as TpuKernels, kernels_for as kernels_for
from .pass_inputs import Branch as Branch, StageShape as StageShape
from .verification import (
    KernelMode as KernelMode,
    Verification as Verification,
    choose_kernels as choose_kernels,
    stages_without_kernels as stages_without_kernels,
    verify_kernels as verify_kernels,
)

from .block import (
    MlpWeights as MlpWeights,
    fold_mlp as fold_mlp,
    mlp_residual as mlp_residual,
    pooling_residual as pooling_residual,
)
from .cpu_batching import largest_divisor as largest_divisor, microbatched as microbatched
from .dense_layer import dense as dense
from .depthwise_convolution import convolve_depthwise as convolve_depthwise
from .kernels import (
    Branch as Branch,
    GpuKernels as GpuKernels,
    KernelMode as KernelMode,
    Kernels as Kernels,
    Pass as Pass,
    StageShape as StageShape,
    TpuKernels as TpuKernels,
    Verification as Verification,
    choose_kernels as choose_kernels,
    kernels_for as kernels_for,
    stages_without_kernels as stages_without_kernels,
    verify_kernels as verify_kernels,
)
from .layers import (
    NormDenseWeights as NormDenseWeights,
    dense_residual as dense_residual,
    layer_norm as layer_norm,
    layer_norm_and_input as layer_norm_and_input,
    norm_dense as norm_dense,
    norm_mlp_residual as norm_mlp_residual,
)
from .patch_convolution import convolve as convolve, convolve_with_default_gradient as convolve_with_default_gradient
from .self_attention import self_attention as self_attention
from .sharding_types import partition_spec as partition_spec, with_auto_sharding as with_auto_sharding
from .statistics import Moments as Moments, moments_of as moments_of

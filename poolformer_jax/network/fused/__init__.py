"""PoolFormer's blocks and convolutions in few passes over the feature map, with custom gradients.

The functions here compute what the linen layers of `network` compute. They take arrays, and know neither the model nor
its config. Other packages use the names below. Each is imported when it is first used.
"""

from typing import TYPE_CHECKING

from poolformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from poolformer_jax.network.fused.block import MlpWeights, fold_mlp, mlp_residual, pooling_residual
    from poolformer_jax.network.fused.cpu_batching import largest_divisor
    from poolformer_jax.network.fused.kernels import (
        GpuKernels,
        KernelMode,
        Kernels,
        StageShape,
        TpuKernels,
        Verification,
        choose_kernels,
        kernels_for,
        stages_without_kernels,
        verify_kernels,
    )
    from poolformer_jax.network.fused.patch_convolution import convolve, convolve_with_default_gradient
    from poolformer_jax.network.fused.statistics import Moments, moments_of

__all__ = [
    "GpuKernels",
    "KernelMode",
    "Kernels",
    "MlpWeights",
    "Moments",
    "StageShape",
    "TpuKernels",
    "Verification",
    "choose_kernels",
    "convolve",
    "convolve_with_default_gradient",
    "fold_mlp",
    "kernels_for",
    "largest_divisor",
    "mlp_residual",
    "moments_of",
    "pooling_residual",
    "stages_without_kernels",
    "verify_kernels",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "block": "MlpWeights fold_mlp mlp_residual pooling_residual",
        "cpu_batching": "largest_divisor",
        "kernels": "GpuKernels KernelMode Kernels StageShape TpuKernels Verification choose_kernels kernels_for "
        "stages_without_kernels verify_kernels",
        "patch_convolution": "convolve convolve_with_default_gradient",
        "statistics": "Moments moments_of",
    },
)

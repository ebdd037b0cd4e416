"""PoolFormer's blocks and convolutions in few passes over the feature map, with gradients of their own.

The functions here compute what the linen layers of `network` compute. They take arrays, and know neither the model nor
its config. What the rest of the library uses is imported when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

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
    from poolformer_jax.network.fused.patch_convolution import convolve, convolve_plainly
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
    "convolve_plainly",
    "fold_mlp",
    "kernels_for",
    "largest_divisor",
    "mlp_residual",
    "moments_of",
    "pooling_residual",
    "stages_without_kernels",
    "verify_kernels",
]

# The module that each name comes from.
_HOME = {
    **dict.fromkeys(("MlpWeights", "fold_mlp", "mlp_residual", "pooling_residual"), "block"),
    **dict.fromkeys(("convolve", "convolve_plainly"), "patch_convolution"),
    **dict.fromkeys(("Moments", "moments_of"), "statistics"),
    "largest_divisor": "cpu_batching",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME.get(name, 'kernels')}"), name)

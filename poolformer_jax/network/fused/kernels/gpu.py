"""The MLP branch on NVIDIA GPUs, as `fused` calls it: Pallas kernels in place of what XLA makes of the hidden layer.

XLA fuses little with a GPU's matrix products. It writes the hidden layer, four times as large as the map, reads it for
the activation, writes it again and reads it again, and several times more in the backward pass; that is most of what a
block costs. In narrow stages no part of it needs to be written (`gpu_narrow`), in wide ones it is, but once
(`gpu_wide`).

Triton compiles the kernels. jax has deprecated Pallas' way through it since 0.11; where a later jax has none,
`kernels_for` finds no kernels.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from poolformer_jax.network.fused import statistics
from poolformer_jax.network.fused.kernels import gpu_narrow, gpu_wide
from poolformer_jax.network.fused.kernels.choice import GpuKernels, Pass, side_of_blocks
from poolformer_jax.network.fused.statistics import Moments

# Of a narrow stage. Above, reading all weights for a few rows costs more than writing the hidden layer does.
_MOST_CHANNELS = 128
# Of those, as `side_of_blocks` cuts them: the sums of seven, 112 channels by 16, overflow Blackwell's tensor memory.
_MOST_BLOCKS = 5

_Map = Float[Array, "b h w c"]
_PerImage = Float[Array, " b"]
_Weights = tuple[Float[Array, "c hidden"], Float[Array, " hidden"], Float[Array, "hidden c"], Float[Array, " c"]]


def mlp_residual(
    kernels: GpuKernels, batched: tuple[_Map, Moments, _PerImage], weights: _Weights
) -> tuple[tuple[_Map, Moments], tuple[()]]:
    """`fused.mlp_residual` of (x, its moments, keep)."""
    x, x_moments, keep = batched
    y, (total, squares), _ = kernels.on_each_device(
        partial(_way(x).forward, interpret=kernels.interpret),
        (x,),
        (x_moments.mean, x_moments.inverse_std, keep),
        _cast(weights, x.dtype),
        batch_axis=0,
    )
    return (y, statistics.from_sums(x_moments.mean, math.prod(x.shape[1:]), total, squares)), ()


def mlp_gradient(
    kernels: GpuKernels,
    batched: tuple[_Map, Moments, _PerImage, _Map, Moments, _Map, Moments],
    weights: _Weights,
) -> tuple[tuple[_Map, Moments], _Weights]:
    """The gradient of `mlp_residual` by x, its moments, and the weights, of (x, .., keep, y, .., dy, ..)."""
    x, x_moments, keep, y, y_moments, dy, dmoments = batched
    through_moments = statistics.slope_and_offset(math.prod(y.shape[1:]), y_moments, dmoments)
    dx, (total, products), dweights = kernels.on_each_device(
        partial(_way(x).backward, interpret=kernels.interpret),
        (x, y, dy),
        (x_moments.mean, x_moments.inverse_std, keep, *through_moments),
        _cast(weights, x.dtype),
        batch_axis=0,
    )
    return (dx, statistics.through_standardized(x_moments, total, products)), dweights


PASSES: Mapping[Pass, Callable[[GpuKernels, Any, Any], tuple[Any, Any]]] = {
    "mlp_residual": mlp_residual,
    "mlp_gradient": mlp_gradient,
}


def _way(x: _Map) -> ModuleType:
    channels = x.shape[3]
    narrow = channels <= _MOST_CHANNELS and channels // side_of_blocks(channels) <= _MOST_BLOCKS
    return gpu_narrow if narrow else gpu_wide


def _cast(weights: _Weights, dtype: Dtype) -> _Weights:
    """Matrices in the maps' type, vectors in float32."""
    kernel1, bias1, kernel2, bias2 = weights
    return kernel1.astype(dtype), bias1.astype(jnp.float32), kernel2.astype(dtype), bias2.astype(jnp.float32)

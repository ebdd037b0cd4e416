"""The MLP branch's forward pass on NVIDIA GPUs, as `block` calls it: Pallas kernels that compute the hidden layer.

XLA fuses little with a GPU's matrix products. It writes the hidden layer, four times as large as the map, reads it for
the activation, and writes and reads it again. Kernels do not write it at all in narrow stages (`gpu_narrow`), and write
it once in wide ones (`gpu_wide`). XLA computes the backward pass: on an H200 kernels took longer (docs/notes/tried.md).

Triton compiles the kernels. jax has deprecated Pallas' Triton backend since 0.11. Where jax lacks it, importing this
module raises ImportError.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from poolformer_jax.network.fused import statistics
from poolformer_jax.network.fused.kernels import gpu_narrow, gpu_wide
from poolformer_jax.network.fused.kernels.base import Kernels, Pass, block_size
from poolformer_jax.network.fused.statistics import Moments

# In a wider stage reading all weights for a few rows costs more than writing the hidden layer.
_MOST_CHANNELS = 128
# With seven blocks (112 channels in blocks of 16) the sums overflow Blackwell's tensor memory.
_MOST_BLOCKS = 5

_Map = Float[Array, "b h w c"]
_PerImage = Float[Array, " b"]
_Weights = tuple[Float[Array, "c hidden"], Float[Array, " hidden"], Float[Array, "hidden c"], Float[Array, " c"]]


def mlp_residual(
    kernels: Kernels, batched: tuple[_Map, Moments, _PerImage], weights: _Weights
) -> tuple[tuple[_Map, Moments], tuple[()]]:
    """`block.mlp_residual` of (x, its moments, keep)."""
    (x, x_moments, keep), channels = batched, batched[0].shape[3]
    kernel1, bias1, kernel2, bias2 = weights
    narrow = channels <= _MOST_CHANNELS and channels // block_size(channels) <= _MOST_BLOCKS
    y, (total, squares), _ = kernels.run_on_shards(
        partial((gpu_narrow if narrow else gpu_wide).forward, interpret=kernels.interpret),
        (x,),
        (x_moments.mean, x_moments.inverse_std, keep),
        (kernel1.astype(x.dtype), bias1.astype(jnp.float32), kernel2.astype(x.dtype), bias2.astype(jnp.float32)),
        batch_axis=0,
    )
    return (y, statistics.moments_from_sums(x_moments.mean, math.prod(x.shape[1:]), total, squares)), ()


PASSES: Mapping[Pass, Callable[[Kernels, Any, Any], tuple[Any, Any]]] = {"mlp_residual": mlp_residual}

"""The MLP branch of wide stages on NVIDIA GPUs: a kernel computes the hidden layer, XLA the rest.

With many channels a program cannot hold a row of the map, so the hidden layer has to be written. The kernel computes
and writes it, activation included.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from poolformer_jax.network.functional import gelu_fit, widen
from poolformer_jax.network.fused.kernels.base import GPU_ROWS, block_size
from poolformer_jax.network.fused.statistics import broadcast_over_map

_Map = Float[Array, "b h w c"]
_PerImage = Float[Array, " b"]
_Rows = Float[Array, "rows c"]
_Hidden = Float[Array, "rows hidden"]
_Weights = tuple[Float[Array, "c hidden"], Float[Array, " hidden"], Float[Array, "hidden c"], Float[Array, " c"]]


def forward(
    maps: tuple[_Map], vectors: tuple[_PerImage, ...], weights: _Weights, *, interpret: bool
) -> tuple[_Map, tuple[_PerImage, _PerImage], tuple[()]]:
    """As `gpu_narrow.forward`."""
    (x,), (mean, inverse_std, keep), (kernel1, bias1, kernel2, bias2) = maps, vectors, weights
    standard = (widen(x) - broadcast_over_map(mean)) * broadcast_over_map(inverse_std)
    hidden = _hidden_layer(standard.astype(x.dtype).reshape(-1, x.shape[-1]), kernel1, bias1, interpret)
    branch = (jnp.dot(hidden, kernel2) + bias2.astype(x.dtype)).reshape(x.shape)
    y = (widen(x) + widen(branch) * broadcast_over_map(keep)).astype(x.dtype)
    distance = widen(y) - broadcast_over_map(mean)
    return y, (distance.sum((1, 2, 3)), (distance * distance).sum((1, 2, 3))), ()


def _hidden_layer(
    z: _Rows, kernel1: Float[Array, "c hidden"], bias1: Float[Array, " hidden"], interpret: bool
) -> _Hidden:
    """`gelu(z @ kernel1 + bias1)`, a tile per program, which sums over the map's channels block by block."""
    (rows, channels), hidden = z.shape, kernel1.shape[1]
    height = 2 * GPU_ROWS if rows % (2 * GPU_ROWS) == 0 else GPU_ROWS
    width, side = block_size(hidden, 128), block_size(channels)
    across = hidden // width

    def kernel(z_ref: Any, w1: Any, b1: Any, hidden_ref: Any) -> None:
        # Neighbouring programs read the same rows.
        tile_rows = pl.ds(pl.program_id(0) // across * height, height)
        columns = pl.ds(pl.program_id(0) % across * width, width)

        def add(index: Any, total: Array) -> Array:
            block = pl.ds(index * side, side)
            return total + jnp.dot(z_ref[tile_rows, block], w1[block, columns], preferred_element_type=jnp.float32)

        inner = lax.fori_loop(0, channels // side, add, jnp.zeros((height, width), jnp.float32))
        hidden_ref[tile_rows, columns] = gelu_fit(inner + b1[columns][None])[0].astype(hidden_ref.dtype)

    layer: _Hidden = pl.pallas_call(
        kernel,
        name="mlp_hidden",
        grid=(rows // height * across,),
        out_shape=jax.ShapeDtypeStruct((rows, hidden), z.dtype),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),  # three pipelined loads
    )(z, kernel1, bias1)
    return layer

"""The end of a sep_conv mixer, forward and backward, as TPU kernels: dense layer and residual."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from poolformer_jax.network.fused.kernels import tpu_tiles
from poolformer_jax.network.fused.kernels.tpu_norm_mlp import Tile
from poolformer_jax.network.fused.kernels.tpu_tiles import SUBLANES, by_position, product, rows_of

_Map = Float[Array, "h w b c"]
_Hidden = Float[Array, "h w b hidden"]
_PerImage = Float[Array, " b"]
_Kernel = Float[Array, "hidden c"]
_PerChannel = Float[Array, " c"]


def forward(
    maps: tuple[_Map, _Hidden], vectors: tuple[_PerImage], parameters: tuple[_Kernel, _PerChannel], *, interpret: bool
) -> tuple[_Map, tuple[()], tuple[()]]:
    """`x + keep * (hidden @ kernel + bias)`.

    Args:
        maps: (x, hidden), bfloat16, [height, width, batch, channels].
        vectors: (keep), the branch's factor.
        parameters: (kernel, bias), in bfloat16 and float32.
        interpret: compute on any platform.
    """
    (x, hidden), (keep,), (kernel, bias) = maps, vectors, parameters

    def compute_tile(x_ref: Any, hidden_ref: Any, keep_ref: Any, w: Any, b: Any, y_ref: Any) -> None:
        branch = (product(rows_of(hidden_ref[...]), w[...]) + b[...]).reshape(x_ref.shape)
        y_ref[...] = (x_ref[...].astype(jnp.float32) + branch * keep_ref[...]).astype(y_ref.dtype)

    tile, rows = Tile(x, hidden.shape[3]), [by_position(z) for z in maps]
    matrices, result = (kernel, bias[None]), tpu_tiles.output(rows[0].shape, x.dtype)
    y = pl.pallas_call(
        compute_tile,
        name="dense_residual_forward",
        in_specs=[tile.map, tile.hidden, tile.column, *map(tpu_tiles.whole, matrices)],
        out_specs=tile.map,
        out_shape=result,
        interpret=interpret,
        **tpu_tiles.options(
            "parallel",
            "parallel",
            grid=tile.grid,
            flops=2 * x.size * hidden.shape[3],
            arrays=[*maps, *matrices, result],
        ),
    )(*rows, keep[:, None], *matrices)
    return y.reshape(x.shape), (), ()


def backward(
    maps: tuple[_Map, _Hidden], vectors: tuple[_PerImage], parameters: tuple[_Kernel, _PerChannel], *, interpret: bool
) -> tuple[_Hidden, tuple[()], tuple[_Kernel, _PerChannel]]:
    """The gradients of `forward` by hidden, and by kernel and bias, these in float32.

    Args:
        maps: (dy, hidden).
        vectors: as in `forward`.
        parameters: as in `forward`.
        interpret: as in `forward`.
    """
    (dy, hidden), (keep,), (kernel, _) = maps, vectors, parameters

    def compute_tile(
        dy_ref: Any, hidden_ref: Any, keep_ref: Any, w: Any, dhidden_ref: Any, dw_ref: Any, db_ref: Any
    ) -> None:
        tpu_tiles.zero_if((pl.program_id(0) == 0) & (pl.program_id(1) == 0), dw_ref, db_ref)
        wide = rows_of(dy_ref[...].astype(jnp.float32) * keep_ref[...])
        dbranch = wide.astype(dy_ref.dtype)
        dhidden = product(dbranch, w[...], transpose_right=True)
        dhidden_ref[...] = dhidden.reshape(dhidden_ref.shape).astype(dhidden_ref.dtype)
        dw_ref[...] += product(rows_of(hidden_ref[...]), dbranch, transpose_left=True)
        db_ref[...] += tpu_tiles.sum_to_register(wide)

    tile, rows = Tile(dy, hidden.shape[3]), [by_position(z) for z in maps]
    gradients = [tpu_tiles.output(kernel.shape), tpu_tiles.output((SUBLANES, dy.shape[3]))]
    results = [tpu_tiles.output(rows[1].shape, dy.dtype), *gradients]
    dhidden, dkernel, dbias = pl.pallas_call(
        compute_tile,
        name="dense_residual_backward",
        in_specs=[tile.map, tile.hidden, tile.column, tpu_tiles.whole(kernel)],
        out_specs=[tile.hidden, *map(tpu_tiles.whole, gradients)],
        out_shape=results,
        interpret=interpret,
        **tpu_tiles.options(
            "arbitrary",
            "arbitrary",
            grid=tile.grid,
            flops=2 * 2 * dy.size * hidden.shape[3],
            arrays=[*maps, kernel, *results],
        ),
    )(*rows, keep[:, None], kernel)
    return dhidden.reshape(hidden.shape), (), (dkernel, dbias.sum(0))

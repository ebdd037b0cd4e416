"""The layer norm of feature maps, forward and backward, as TPU kernels."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from poolformer_jax.network.fused.kernels import tpu_tiles
from poolformer_jax.network.fused.kernels.tpu_norm_mlp import (
    Tile,
    as_matrices,
    parameter_specs,
    standardize,
    standardize_gradient,
)
from poolformer_jax.network.fused.kernels.tpu_tiles import SUBLANES, by_position, rows_of

_Map = Float[Array, "h w b c"]
_PerChannel = Float[Array, " c"]
_Parameters = tuple[Float[Array, ""], _PerChannel, _PerChannel]


def forward(
    maps: tuple[_Map], _: tuple[()], parameters: _Parameters, *, interpret: bool
) -> tuple[_Map, tuple[()], tuple[()]]:
    """`(x - mean) / std * gain + shift`, with mean and std of each position.

    Args:
        maps: (x), bfloat16, [height, width, batch, channels].
        parameters: (epsilon, gain, shift), float32.
        interpret: compute on any platform.
    """
    (x,) = maps

    def compute_tile(x_ref: Any, epsilon: Any, gain: Any, shift: Any, y_ref: Any) -> None:
        standard, _ = standardize(rows_of(x_ref[...].astype(jnp.float32)), epsilon[0, 0])
        y_ref[...] = (standard * gain[...] + shift[...]).reshape(y_ref.shape).astype(y_ref.dtype)

    rows, matrices, tile = by_position(x), as_matrices(parameters), Tile(x, x.shape[3])
    result = tpu_tiles.output(rows.shape, x.dtype)
    y = pl.pallas_call(
        compute_tile,
        name="norm_forward",
        in_specs=[tile.map, *parameter_specs(matrices)],
        out_specs=tile.map,
        out_shape=result,
        interpret=interpret,
        **tpu_tiles.options("parallel", "parallel", grid=tile.grid, flops=8 * x.size, arrays=[x, *matrices, result]),
    )(rows, *matrices)
    return y.reshape(x.shape), (), ()


def backward(
    maps: tuple[_Map, ...], _: tuple[()], parameters: _Parameters, *, interpret: bool
) -> tuple[_Map, tuple[()], tuple[_PerChannel, _PerChannel]]:
    """The gradients of `forward` by x, and by gain and shift, these in float32.

    Args:
        maps: (x, the gradient of the result), and maybe a map to which the gradient by x is added.
        parameters: as in `forward`.
        interpret: as in `forward`.
    """
    x = maps[0]

    def compute_tile(x_ref: Any, dy_ref: Any, *refs: Any) -> None:
        *trunk_refs, epsilon, gain, dx_ref, dgain_ref, dshift_ref = refs
        tpu_tiles.zero_if((pl.program_id(0) == 0) & (pl.program_id(1) == 0), dgain_ref, dshift_ref)
        standard, inverse_std = standardize(rows_of(x_ref[...].astype(jnp.float32)), epsilon[0, 0])
        dy = rows_of(dy_ref[...].astype(jnp.float32))
        dx = standardize_gradient(standard, inverse_std, dy * gain[...]).reshape(dx_ref.shape)
        for trunk_ref in trunk_refs:
            dx += trunk_ref[...].astype(jnp.float32)
        dx_ref[...] = dx.astype(dx_ref.dtype)
        for ref, summed in ((dgain_ref, dy * standard), (dshift_ref, dy)):
            ref[...] += tpu_tiles.sum_to_register(summed)

    rows, matrices = [by_position(z) for z in maps], as_matrices(parameters)[:-1]
    tile, vector = Tile(x, x.shape[3]), tpu_tiles.output((SUBLANES, x.shape[3]))
    results = [tpu_tiles.output(rows[0].shape, x.dtype), vector, vector]
    dx, dgain, dshift = pl.pallas_call(
        compute_tile,
        name="norm_backward",
        in_specs=[*[tile.map] * len(maps), *parameter_specs(matrices)],
        out_specs=[tile.map, *map(tpu_tiles.whole, [vector, vector])],
        out_shape=results,
        interpret=interpret,
        **tpu_tiles.options(
            "arbitrary", "arbitrary", grid=tile.grid, flops=20 * x.size, arrays=[*maps, *matrices, *results]
        ),
    )(*rows, *matrices)
    return dx.reshape(x.shape), (), (dgain.sum(0), dshift.sum(0))

"""The start of a sep_conv mixer, forward and backward, as TPU kernels: layer norm, dense layer, StarReLU."""

import math
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
from poolformer_jax.network.fused.kernels.tpu_tiles import SUBLANES, by_position, product, rows_of

_Map = Float[Array, "h w b c"]
_Hidden = Float[Array, "h w b hidden"]
_Kernel = Float[Array, "c hidden"]
_PerHidden = Float[Array, " hidden"]
_Parameters = tuple[Float[Array, ""], _Kernel, _PerHidden, _PerHidden, _PerHidden]


def forward(
    maps: tuple[_Map], _: tuple[()], parameters: _Parameters, *, interpret: bool
) -> tuple[_Hidden, tuple[()], tuple[()]]:
    """`scale * relu(standard @ kernel + bias)² + shift`, where `standard = (x - mean) / std` at each position.

    Args:
        maps: (x), bfloat16, [height, width, batch, channels].
        parameters: (epsilon, kernel, bias, scale, shift); the kernel in bfloat16, the others in float32.
        interpret: compute on any platform.
    """
    (x,), kernel = maps, parameters[1]
    hidden_size = kernel.shape[1]

    def compute_tile(x_ref: Any, epsilon: Any, w: Any, b: Any, scale: Any, shift: Any, y_ref: Any) -> None:
        standard, _ = standardize(rows_of(x_ref[...].astype(jnp.float32)), epsilon[0, 0])
        positive = jnp.maximum(product(standard.astype(x_ref.dtype), w[...]) + b[...], 0)
        y_ref[...] = (positive * positive * scale[...] + shift[...]).reshape(y_ref.shape).astype(y_ref.dtype)

    tile, rows, matrices = Tile(x, hidden_size), by_position(x), as_matrices(parameters)
    result = tpu_tiles.output((*rows.shape[:2], hidden_size), x.dtype)
    hidden = pl.pallas_call(
        compute_tile,
        name="norm_dense_forward",
        in_specs=[tile.map, *parameter_specs(matrices)],
        out_specs=tile.hidden,
        out_shape=result,
        interpret=interpret,
        **tpu_tiles.options(
            "parallel",
            "parallel",
            grid=tile.grid,
            flops=2 * math.prod(rows.shape) * hidden_size,
            arrays=[x, *matrices, result],
        ),
    )(rows, *matrices)
    return hidden.reshape(*x.shape[:3], hidden_size), (), ()


def backward(
    maps: tuple[_Map, _Map, _Hidden], _: tuple[()], parameters: _Parameters, *, interpret: bool
) -> tuple[_Map, tuple[()], tuple[_Kernel, _PerHidden, _PerHidden, _PerHidden]]:
    """The gradients of `forward` by x, added to another one, and by kernel, bias, scale and shift, these in float32.

    Args:
        maps: (x, the other gradient by x, the gradient of the result).
        parameters: as in `forward`.
        interpret: as in `forward`.
    """
    x, kernel = maps[0], parameters[1]
    hidden_size = kernel.shape[1]

    def compute_tile(
        x_ref: Any, trunk_ref: Any, dy_ref: Any, epsilon: Any, w: Any, b: Any, scale: Any,
        dx_ref: Any, dw_ref: Any, db_ref: Any, dscale_ref: Any, dshift_ref: Any,
    ) -> None:  # fmt: skip
        first = (pl.program_id(0) == 0) & (pl.program_id(1) == 0)
        tpu_tiles.zero_if(first, dw_ref, db_ref, dscale_ref, dshift_ref)
        standard, inverse_std = standardize(rows_of(x_ref[...].astype(jnp.float32)), epsilon[0, 0])
        rounded, dy = standard.astype(x_ref.dtype), rows_of(dy_ref[...]).astype(jnp.float32)
        positive = jnp.maximum(product(rounded, w[...]) + b[...], 0)
        dinner_wide = dy * (2 * scale[...] * positive)
        dinner = dinner_wide.astype(x_ref.dtype)
        dnorm = standardize_gradient(standard, inverse_std, product(dinner, w[...], transpose_right=True))
        dx_ref[...] = (trunk_ref[...].astype(jnp.float32) + dnorm.reshape(dx_ref.shape)).astype(dx_ref.dtype)
        dw_ref[...] += product(rounded, dinner, transpose_left=True)
        for ref, summed in ((db_ref, dinner_wide), (dscale_ref, dy * positive * positive), (dshift_ref, dy)):
            ref[...] += tpu_tiles.sum_to_register(summed)

    tile, rows = Tile(x, hidden_size), [by_position(z) for z in maps]
    matrices = as_matrices(parameters)[:-1]
    vector = tpu_tiles.output((SUBLANES, hidden_size))
    gradients = [tpu_tiles.output(kernel.shape), vector, vector, vector]
    results = [tpu_tiles.output(rows[0].shape, x.dtype), *gradients]
    dx, dkernel, *sums = pl.pallas_call(
        compute_tile,
        name="norm_dense_backward",
        in_specs=[tile.map, tile.map, tile.hidden, *parameter_specs(matrices)],
        out_specs=[tile.map, *map(tpu_tiles.whole, gradients)],
        out_shape=results,
        interpret=interpret,
        **tpu_tiles.options(
            "arbitrary",
            "arbitrary",
            grid=tile.grid,
            flops=2 * 3 * x.size * hidden_size,
            arrays=[*maps, *matrices, *results],
        ),
    )(*rows, *matrices)
    dbias, dscale, dshift = (total.sum(0) for total in sums)
    return dx.reshape(x.shape), (), (dkernel, dbias, dscale, dshift)

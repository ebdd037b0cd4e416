"""The start of a sep_conv mixer, forward and backward, as TPU kernels: layer norm, dense layer, StarReLU."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from poolformer_jax.network.fused.kernels import tpu_rows, tpu_tiles
from poolformer_jax.network.fused.kernels.tpu_rows import standardize, standardize_gradient
from poolformer_jax.network.fused.kernels.tpu_tiles import product, rows_of

_Map = Float[Array, "h w b c"]
_Hidden = Float[Array, "h w b hidden"]
_Kernel = Float[Array, "c hidden"]
_PerHidden = Float[Array, " hidden"]
_Parameters = tuple[Float[Array, ""], _Kernel, _PerHidden, _PerHidden, _PerHidden]


def forward(
    maps: tuple[_Map], vectors: tuple[()], parameters: _Parameters, *, interpret: bool
) -> tuple[_Hidden, tuple[()], tuple[()]]:
    """`scale * relu(standard @ kernel + bias)² + shift`, where `standard = (x - mean) / std` at each position.

    `maps` are (x), `parameters` (epsilon, kernel, bias, scale, shift).
    """
    (x,), hidden_size = maps, parameters[1].shape[1]

    def compute_tile(x_ref: Any, epsilon: Any, w: Any, b: Any, scale: Any, shift: Any, y_ref: Any) -> None:
        standard, _ = standardize(rows_of(x_ref[...].astype(jnp.float32)), epsilon[0, 0])
        positive = jnp.maximum(product(standard.astype(x_ref.dtype), w[...]) + b[...], 0)
        y_ref[...] = (positive * positive * scale[...] + shift[...]).reshape(y_ref.shape).astype(y_ref.dtype)

    return tpu_rows.call(
        "norm_dense_forward",
        compute_tile,
        maps,
        vectors,
        parameters,
        channels=hidden_size,
        flops=2 * x.size * hidden_size,
        interpret=interpret,
    )


def backward(
    maps: tuple[_Map, _Hidden, _Map], vectors: tuple[()], parameters: _Parameters, *, interpret: bool
) -> tuple[_Map, tuple[()], tuple[_Kernel, _PerHidden, _PerHidden, _PerHidden]]:
    """The gradients of `forward` by x, added to another one, and by kernel, bias, scale and shift.

    `maps` are (x, the gradient of the result, the other gradient by x).
    """
    x, hidden_size = maps[0], parameters[1].shape[1]

    def compute_tile(
        x_ref: Any, dy_ref: Any, trunk_ref: Any, epsilon: Any, w: Any, b: Any, scale: Any,
        dx_ref: Any, dw_ref: Any, db_ref: Any, dscale_ref: Any, dshift_ref: Any,
    ) -> None:  # fmt: skip
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

    return tpu_rows.call(
        "norm_dense_backward",
        compute_tile,
        maps,
        vectors,
        parameters,
        channels=x.shape[3],
        backward=True,
        flops=2 * 3 * x.size * hidden_size,
        interpret=interpret,
    )

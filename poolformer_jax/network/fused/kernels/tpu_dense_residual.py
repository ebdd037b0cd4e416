"""The end of a sep_conv mixer, forward and backward, as TPU kernels: dense layer and residual."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from poolformer_jax.network.fused.kernels import tpu_rows, tpu_tiles
from poolformer_jax.network.fused.kernels.tpu_tiles import product, rows_of

_Map = Float[Array, "h w b c"]
_Hidden = Float[Array, "h w b hidden"]
_PerImage = Float[Array, " b"]
_Kernel = Float[Array, "hidden c"]
_PerChannel = Float[Array, " c"]


def forward(
    maps: tuple[_Map, _Hidden], vectors: tuple[_PerImage], parameters: tuple[_Kernel, _PerChannel], *, interpret: bool
) -> tuple[_Map, tuple[()], tuple[()]]:
    """`x + keep * (hidden @ kernel + bias)`.

    `maps` are (x, hidden), `vectors` (keep), `parameters` (kernel, bias).
    """
    hidden_size, channels = parameters[0].shape

    def compute_tile(x_ref: Any, hidden_ref: Any, keep_ref: Any, w: Any, b: Any, y_ref: Any) -> None:
        branch = (product(rows_of(hidden_ref[...]), w[...]) + b[...]).reshape(x_ref.shape)
        y_ref[...] = (x_ref[...].astype(jnp.float32) + branch * keep_ref[...]).astype(y_ref.dtype)

    return tpu_rows.call(
        "dense_residual_forward",
        compute_tile,
        maps,
        vectors,
        parameters,
        channels=channels,
        flops=2 * maps[0].size * hidden_size,
        interpret=interpret,
    )


def backward(
    maps: tuple[_Map, _Hidden], vectors: tuple[_PerImage], parameters: tuple[_Kernel, _PerChannel], *, interpret: bool
) -> tuple[_Hidden, tuple[()], tuple[_Kernel, _PerChannel]]:
    """The gradients of `forward` by hidden, and by kernel and bias; `maps` are (dy, hidden)."""
    hidden_size = parameters[0].shape[0]

    def compute_tile(
        dy_ref: Any, hidden_ref: Any, keep_ref: Any, w: Any, dhidden_ref: Any, dw_ref: Any, db_ref: Any
    ) -> None:
        wide = rows_of(dy_ref[...].astype(jnp.float32) * keep_ref[...])
        dbranch = wide.astype(dy_ref.dtype)
        dhidden = product(dbranch, w[...], transpose_right=True)
        dhidden_ref[...] = dhidden.reshape(dhidden_ref.shape).astype(dhidden_ref.dtype)
        dw_ref[...] += product(rows_of(hidden_ref[...]), dbranch, transpose_left=True)
        db_ref[...] += tpu_tiles.sum_to_register(wide)

    return tpu_rows.call(
        "dense_residual_backward",
        compute_tile,
        maps,
        vectors,
        parameters,
        channels=hidden_size,
        backward=True,
        flops=2 * 2 * maps[0].size * hidden_size,
        interpret=interpret,
    )

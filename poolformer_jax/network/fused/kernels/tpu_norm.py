"""The layer norm of feature maps, forward and backward, as TPU kernels."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from poolformer_jax.network.fused.kernels import tpu_rows, tpu_tiles
from poolformer_jax.network.fused.kernels.tpu_rows import standardize, standardize_gradient
from poolformer_jax.network.fused.kernels.tpu_tiles import rows_of

_Map = Float[Array, "h w b c"]
_PerChannel = Float[Array, " c"]
_Parameters = tuple[Float[Array, ""], _PerChannel, _PerChannel]


def forward(
    maps: tuple[_Map], vectors: tuple[()], parameters: _Parameters, *, interpret: bool
) -> tuple[_Map, tuple[()], tuple[()]]:
    """`(x - mean) / std * gain + shift`, with mean and std of each position.

    `maps` are (x), `parameters` (epsilon, gain, shift).
    """
    (x,) = maps

    def compute_tile(x_ref: Any, epsilon: Any, gain: Any, shift: Any, y_ref: Any) -> None:
        standard, _ = standardize(rows_of(x_ref[...].astype(jnp.float32)), epsilon[0, 0])
        y_ref[...] = (standard * gain[...] + shift[...]).reshape(y_ref.shape).astype(y_ref.dtype)

    return tpu_rows.call(
        "norm_forward",
        compute_tile,
        maps,
        vectors,
        parameters,
        channels=x.shape[3],
        flops=8 * x.size,
        interpret=interpret,
    )


def backward(
    maps: tuple[_Map, ...], vectors: tuple[()], parameters: _Parameters, *, interpret: bool
) -> tuple[_Map, tuple[()], tuple[_PerChannel, _PerChannel]]:
    """The gradients of `forward` by x, and by gain and shift.

    `maps` are (x, the gradient of the result), and maybe a map to which the gradient by x is added.
    """
    x = maps[0]

    def compute_tile(x_ref: Any, dy_ref: Any, *refs: Any) -> None:
        *trunk_refs, epsilon, gain, dx_ref, dgain_ref, dshift_ref = refs
        standard, inverse_std = standardize(rows_of(x_ref[...].astype(jnp.float32)), epsilon[0, 0])
        dy = rows_of(dy_ref[...].astype(jnp.float32))
        dx = standardize_gradient(standard, inverse_std, dy * gain[...]).reshape(dx_ref.shape)
        for trunk_ref in trunk_refs:
            dx += trunk_ref[...].astype(jnp.float32)
        dx_ref[...] = dx.astype(dx_ref.dtype)
        for ref, summed in ((dgain_ref, dy * standard), (dshift_ref, dy)):
            ref[...] += tpu_tiles.sum_to_register(summed)

    return tpu_rows.call(
        "norm_backward",
        compute_tile,
        maps,
        vectors,
        parameters,
        channels=x.shape[3],
        backward=True,
        flops=20 * x.size,
        interpret=interpret,
    )

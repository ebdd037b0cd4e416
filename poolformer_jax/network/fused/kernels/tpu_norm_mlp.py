"""The MLP branch of the second paper's blocks, with its layer norm, forward and backward, as TPU kernels.

The backward kernel computes everything that depends on the hidden layer while it is in VMEM.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from poolformer_jax.network.fused.kernels import tpu_rows, tpu_tiles
from poolformer_jax.network.fused.kernels.tpu_rows import standardize, standardize_gradient
from poolformer_jax.network.fused.kernels.tpu_tiles import product, rows_of

_Map = Float[Array, "h w b c"]
_PerImage = Float[Array, " b"]
_PerChannel = Float[Array, " c"]
_Kernel1 = Float[Array, "c hidden"]
_Bias1 = Float[Array, " hidden"]
_Kernel2 = Float[Array, "hidden c"]
_Gradients = tuple[_PerChannel, _Kernel1, _Bias1, _Kernel2, _PerChannel]
_Parameters = tuple[Float[Array, ""], _PerChannel, _Kernel1, _Bias1, _Kernel2, _PerChannel]


def forward(
    maps: tuple[_Map], vectors: tuple[_PerImage], parameters: _Parameters, *, interpret: bool
) -> tuple[_Map, tuple[()], tuple[()]]:
    """`y = trunk * x + keep * (relu(standard @ kernel1 + bias1)² @ kernel2 + bias2)`, `standard = (x - mean) / std`.

    `maps` are (x), `vectors` (keep), `parameters` (epsilon, trunk, kernel1, bias1, kernel2, bias2).
    """
    channels, hidden_size = parameters[2].shape

    def compute_tile(
        x_ref: Any, keep_ref: Any, epsilon: Any, trunk: Any, w1: Any, b1: Any, w2: Any, b2: Any, y_ref: Any
    ) -> None:
        x = x_ref[...].astype(jnp.float32)
        standard, _ = standardize(rows_of(x), epsilon[0, 0])
        positive = jnp.maximum(product(standard.astype(x_ref.dtype), w1[...]) + b1[...], 0)
        branch = product((positive * positive).astype(x_ref.dtype), w2[...]) + b2[...]
        y_ref[...] = (x * trunk[...] + branch.reshape(x.shape) * keep_ref[...]).astype(y_ref.dtype)

    return tpu_rows.call(
        "norm_mlp_forward",
        compute_tile,
        maps,
        vectors,
        parameters,
        channels=channels,
        flops=2 * 2 * maps[0].size * hidden_size,
        interpret=interpret,
    )


def backward(
    maps: tuple[_Map, _Map], vectors: tuple[_PerImage], parameters: _Parameters, *, interpret: bool
) -> tuple[_Map, tuple[()], _Gradients]:
    """The gradients of `forward` by x, and by trunk, kernel1, bias1, kernel2 and bias2; `maps` are (x, dy)."""
    channels, hidden_size = parameters[2].shape

    def compute_tile(
        x_ref: Any, dy_ref: Any, keep_ref: Any, epsilon: Any, trunk: Any, w1: Any, b1: Any, w2: Any,
        dx_ref: Any, dtrunk_ref: Any, dw1_ref: Any, db1_ref: Any, dw2_ref: Any, db2_ref: Any,
    ) -> None:  # fmt: skip
        dtype = x_ref.dtype
        x, dy = (ref[...].astype(jnp.float32) for ref in (x_ref, dy_ref))
        standard, inverse_std = standardize(rows_of(x), epsilon[0, 0])
        rounded, dbranch_wide = standard.astype(dtype), rows_of(dy * keep_ref[...])
        dbranch = dbranch_wide.astype(dtype)
        positive = jnp.maximum(product(rounded, w1[...]) + b1[...], 0)
        dinner_wide = product(dbranch, w2[...], transpose_right=True) * (2 * positive)
        dinner = dinner_wide.astype(dtype)
        dstandard = product(dinner, w1[...], transpose_right=True)
        dnorm = standardize_gradient(standard, inverse_std, dstandard)
        dx_ref[...] = (dy * trunk[...] + dnorm.reshape(dy.shape)).astype(dtype)
        dw1_ref[...] += product(rounded, dinner, transpose_left=True)
        dw2_ref[...] += product((positive * positive).astype(dtype), dbranch, transpose_left=True)
        for ref, summed in ((dtrunk_ref, rows_of(dy * x)), (db1_ref, dinner_wide), (db2_ref, dbranch_wide)):
            ref[...] += tpu_tiles.sum_to_register(summed)

    return tpu_rows.call(
        "norm_mlp_backward",
        compute_tile,
        maps,
        vectors,
        parameters,
        channels=channels,
        backward=True,
        flops=2 * 5 * maps[0].size * hidden_size,
        interpret=interpret,
    )

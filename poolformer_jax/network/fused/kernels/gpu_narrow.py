"""The MLP branch of narrow stages on NVIDIA GPUs, in one kernel.

A program holds some rows of the map [positions, channels], computes the hidden layer a few channels at a time, and
writes no part of it. The sides of blocks are powers of two: 96 channels are three blocks of 32.
"""

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from poolformer_jax.network.functional import gelu_fit
from poolformer_jax.network.fused.kernels.base import GPU_ROWS, block_size

_Map = Float[Array, "b h w c"]
_PerImage = Float[Array, " b"]
_Weights = tuple[Float[Array, "c hidden"], Float[Array, " hidden"], Float[Array, "hidden c"], Float[Array, " c"]]


def forward(
    maps: tuple[_Map], vectors: tuple[_PerImage, ...], weights: _Weights, *, interpret: bool
) -> tuple[_Map, tuple[_PerImage, _PerImage], tuple[()]]:
    """The branch with its input, `y = x + keep * mlp((x - mean) * inverse_std)`.

    Args:
        maps: (x), bfloat16, [batch, height, width, channels].
        vectors: (mean, inverse_std, keep); keep is the branch's factor.
        weights: kernel1 and kernel2 in bfloat16, bias1 and bias2 in float32.
        interpret: compute on any platform.

    Returns:
        `y`, and the sums of `y - mean` and of its square over each image.
    """
    (x,), (kernel1, _, _, _) = maps, weights
    channels, hidden_features = kernel1.shape
    side, hidden_side = block_size(channels), block_size(hidden_features)
    parts = [pl.ds(start, side) for start in range(0, channels, side)]
    rows, positions = math.prod(x.shape[:3]), x.shape[1] * x.shape[2]

    def kernel(
        x_ref: Any, mean_ref: Any, inverse_std_ref: Any, keep_ref: Any, w1: Any, b1: Any, w2: Any, b2: Any,
        y_ref: Any, sum_ref: Any, square_ref: Any,
    ) -> None:  # fmt: skip
        own = pl.ds(pl.program_id(0) * GPU_ROWS, GPU_ROWS)
        image = (own.start + jnp.arange(GPU_ROWS)) // positions
        mean, inverse_std, keep = (ref[image][:, None] for ref in (mean_ref, inverse_std_ref, keep_ref))

        def read() -> list[Array]:
            return [x_ref[own, part].astype(jnp.float32) for part in parts]

        standard = [((block - mean) * inverse_std).astype(jnp.bfloat16) for block in read()]

        def add(index: Any, branch: list[Array]) -> list[Array]:
            hidden_part = pl.ds(index * hidden_side, hidden_side)
            inner = functools.reduce(
                operator.add, [_product(block, w1[part, hidden_part]) for block, part in zip(standard, parts)]
            )
            hidden = gelu_fit(inner + b1[hidden_part][None])[0].astype(x_ref.dtype)
            return [total + _product(hidden, w2[hidden_part, part]) for total, part in zip(branch, parts)]

        zeros = [jnp.zeros((GPU_ROWS, side), jnp.float32) for _ in parts]
        branch = lax.fori_loop(0, hidden_features // hidden_side, add, zeros)
        total = squares = jnp.zeros(GPU_ROWS, jnp.float32)
        for part, block, added in zip(parts, read(), branch):  # read again, to free registers in the loop
            y = (block + (added + b2[part][None]) * keep).astype(y_ref.dtype)
            y_ref[own, part] = y
            distance = y.astype(jnp.float32) - mean
            total, squares = total + distance.sum(1), squares + (distance * distance).sum(1)
        sum_ref[own], square_ref[own] = total, squares

    per_row = jax.ShapeDtypeStruct((rows,), jnp.float32)
    y, *sums = pl.pallas_call(
        kernel,
        name="mlp_forward",
        grid=(rows // GPU_ROWS,),
        out_shape=[jax.ShapeDtypeStruct((rows, channels), x.dtype), per_row, per_row],
        interpret=interpret,
        # Enough threads to hold the sums of 64 rows in their registers.
        compiler_params=triton.CompilerParams(num_warps=4 if channels <= 64 else 8, num_stages=2),
    )(x.reshape(rows, channels), *vectors, *weights)
    total, squares = (array.reshape(len(x), positions).sum(1) for array in sums)
    return y.reshape(x.shape), (total, squares), ()


def _product(left: Array, right: Array) -> Array:
    return jnp.dot(left, right, preferred_element_type=jnp.float32)

"""The MLP branch of the second paper's blocks, with its layer norm, forward and backward, as TPU kernels.

A tile holds some positions of some images, so that their hidden layer fits into VMEM. The backward kernel computes
everything that depends on the hidden layer while it is there.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from poolformer_jax.network.fused.cpu_batching import largest_divisor
from poolformer_jax.network.fused.kernels import tpu_tiles
from poolformer_jax.network.fused.kernels.base import TPU_IMAGES
from poolformer_jax.network.fused.kernels.tpu_tiles import SUBLANES, by_position, product, rows_of

_HIDDEN_NUMBERS = 2**18  # most numbers of the hidden layer in a tile
_ROWS = 1024

_Map = Float[Array, "h w b c"]
_PerImage = Float[Array, " b"]
_PerChannel = Float[Array, " c"]
_Kernel1 = Float[Array, "c hidden"]
_Bias1 = Float[Array, " hidden"]
_Kernel2 = Float[Array, "hidden c"]
_Gradients = tuple[_PerChannel, _Kernel1, _Bias1, _Kernel2, _PerChannel]
_Parameters = tuple[Float[Array, ""], _PerChannel, _Kernel1, _Bias1, _Kernel2, _PerChannel]


def fits(channels: int, hidden: int) -> bool:
    """Whether VMEM holds what `backward` needs: two copies of the matrices and of their gradients, and a tile."""
    rows = max(_HIDDEN_NUMBERS // hidden, TPU_IMAGES)
    return 2 * 2 * channels * hidden * (2 + 4) + rows * (16 * hidden + 44 * channels) <= tpu_tiles.VMEM_BYTES


def forward(
    maps: tuple[_Map], vectors: tuple[_PerImage], parameters: _Parameters, *, interpret: bool
) -> tuple[_Map, tuple[()], tuple[()]]:
    """`y = trunk * x + keep * (relu(standard @ kernel1 + bias1)² @ kernel2 + bias2)`, `standard = (x - mean) / std`.

    Args:
        maps: (x), bfloat16, [height, width, batch, channels].
        vectors: (keep), the branch's factor.
        parameters: (epsilon, trunk, kernel1, bias1, kernel2, bias2); kernels in bfloat16, the others in float32.
        interpret: compute on any platform.
    """
    (x,), (keep,), kernel1 = maps, vectors, parameters[2]

    def compute_tile(
        x_ref: Any, keep_ref: Any, epsilon: Any, trunk: Any, w1: Any, b1: Any, w2: Any, b2: Any, y_ref: Any
    ) -> None:
        x = x_ref[...].astype(jnp.float32)
        standard, _ = standardize(rows_of(x), epsilon[0, 0])
        positive = jnp.maximum(product(standard.astype(x_ref.dtype), w1[...]) + b1[...], 0)
        branch = product((positive * positive).astype(x_ref.dtype), w2[...]) + b2[...]
        y_ref[...] = (x * trunk[...] + branch.reshape(x.shape) * keep_ref[...]).astype(y_ref.dtype)

    tile, rows = Tile(x, kernel1.shape[1]), by_position(x)
    matrices = as_matrices(parameters)
    result = tpu_tiles.output(rows.shape, x.dtype)
    y = pl.pallas_call(
        compute_tile,
        name="norm_mlp_forward",
        in_specs=[tile.map, tile.column, *parameter_specs(matrices)],
        out_specs=tile.map,
        out_shape=result,
        interpret=interpret,
        **tpu_tiles.options(
            "parallel",
            "parallel",
            grid=tile.grid,
            flops=2 * 2 * math.prod(rows.shape) * kernel1.shape[1],
            arrays=[x, *matrices, result],
        ),
    )(rows, keep[:, None], *matrices)
    return y.reshape(x.shape), (), ()


def backward(
    maps: tuple[_Map, _Map], vectors: tuple[_PerImage], parameters: _Parameters, *, interpret: bool
) -> tuple[_Map, tuple[()], _Gradients]:
    """The gradients of `forward` by x, and by trunk, kernel1, bias1, kernel2 and bias2, these in float32.

    Args:
        maps: (x, dy).
        vectors: as in `forward`.
        parameters: as in `forward`.
        interpret: as in `forward`.
    """
    (x, _), (keep,), kernel1 = maps, vectors, parameters[2]
    channels, hidden_size = kernel1.shape

    def compute_tile(
        x_ref: Any, dy_ref: Any, keep_ref: Any, epsilon: Any, trunk: Any, w1: Any, b1: Any, w2: Any,
        dx_ref: Any, dtrunk_ref: Any, dw1_ref: Any, db1_ref: Any, dw2_ref: Any, db2_ref: Any,
    ) -> None:  # fmt: skip
        first = (pl.program_id(0) == 0) & (pl.program_id(1) == 0)
        tpu_tiles.zero_if(first, dtrunk_ref, dw1_ref, db1_ref, dw2_ref, db2_ref)
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

    tile, rows = Tile(x, kernel1.shape[1]), [by_position(z) for z in maps]
    matrices = as_matrices(parameters)[:-1]
    gradients = [
        tpu_tiles.output(shape)
        for shape in (
            (SUBLANES, channels),
            (channels, hidden_size),
            (SUBLANES, hidden_size),
            (hidden_size, channels),
            (SUBLANES, channels),
        )
    ]
    results = [tpu_tiles.output(rows[0].shape, x.dtype), *gradients]
    dx, dtrunk, dkernel1, dbias1, dkernel2, dbias2 = pl.pallas_call(
        compute_tile,
        name="norm_mlp_backward",
        in_specs=[tile.map, tile.map, tile.column, *parameter_specs(matrices)],
        out_specs=[tile.map, *map(tpu_tiles.whole, gradients)],
        out_shape=results,
        interpret=interpret,
        **tpu_tiles.options(
            "arbitrary",
            "arbitrary",
            grid=tile.grid,
            flops=2 * 5 * x.size * hidden_size,
            arrays=[*maps, *matrices, *results],
        ),
    )(*rows, keep[:, None], *matrices)
    return dx.reshape(x.shape), (), (dtrunk.sum(0), dkernel1, dbias1.sum(0), dkernel2, dbias2.sum(0))


class Tile:
    """The grid over images, then positions, and the blocks that a tile reads and writes."""

    def __init__(self, x: _Map, hidden_features: int) -> None:
        height, width, batch, _ = x.shape
        rows = min(_ROWS, _HIDDEN_NUMBERS // hidden_features)
        images = tpu_tiles.images_in_tile(batch, max(TPU_IMAGES, min(rows, 64)))
        positions = largest_divisor(height * width, max(1, rows // images))
        self.grid = batch // images, height * width // positions
        self.map, self.hidden = (
            pl.BlockSpec((positions, images, size), lambda image, position: (position, image, 0))
            for size in (x.shape[3], hidden_features)
        )
        self.column = pl.BlockSpec((images, 1), lambda image, position: (image, 0))


def as_matrices(parameters: tuple[Array, ...]) -> list[Array]:
    """The parameters with two axes each."""
    return [jnp.atleast_2d(parameter) for parameter in parameters]


def parameter_specs(matrices: list[Array]) -> list[pl.BlockSpec]:
    """Of the matrices of `as_matrices`. The first is epsilon, which would fill registers if it were a matrix."""
    return [pl.BlockSpec(memory_space=pltpu.SMEM), *map(tpu_tiles.whole, matrices[1:])]


def standardize(x: Float[Array, "rows c"], epsilon: Array) -> tuple[Float[Array, "rows c"], Float[Array, "rows 1"]]:
    """`(x - mean) / std` of each row, and 1 / std."""
    distance = x - _mean(x)
    inverse_std = lax.rsqrt(_mean(distance * distance) + epsilon)
    return distance * inverse_std, inverse_std


def standardize_gradient(
    standard: Float[Array, "rows c"], inverse_std: Float[Array, "rows 1"], dstandard: Float[Array, "rows c"]
) -> Float[Array, "rows c"]:
    """The gradient of `standardize` by its input, from its results and the gradient of the first."""
    return (dstandard - _mean(dstandard) - standard * _mean(dstandard * standard)) * inverse_std


def _mean(x: Float[Array, "rows c"]) -> Float[Array, "rows 1"]:
    return jnp.mean(x, 1, keepdims=True)

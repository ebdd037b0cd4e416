"""The MLP branch, forward and backward, as TPU kernels.

A tile holds some positions of some images, so that their hidden layer fits into VMEM. The backward kernel computes
everything that depends on the hidden layer while it is there: the gradients of the input, of both matrices and of the
biases, and the two sums over each image that norm2's gradient needs.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from poolformer_jax.network.functional import gelu_fit
from poolformer_jax.network.fused.cpu_batching import largest_divisor
from poolformer_jax.network.fused.kernels import tpu_tiles
from poolformer_jax.network.fused.kernels.tpu_tiles import SUBLANES, by_position, product, rows_of

_HIDDEN_NUMBERS = 5 * 2**18  # most numbers of the hidden layer in a tile
_ROWS, _IMAGES = 1024, 64

_Map = Float[Array, "h w b c"]
_PerImage = Float[Array, " b"]
_PerImageAndChannel = Float[Array, "b c"]
_Kernel1 = Float[Array, "c hidden"]
_Weights = tuple[_Kernel1, Float[Array, " hidden"], Float[Array, "hidden c"], Float[Array, " c"]]
_WeightGradients = tuple[
    Float[Array, "c1 hidden1"], Float[Array, " hidden1"], Float[Array, "hidden1 c1"], Float[Array, " c1"]
]


def fits(channels: int, hidden: int, pixels: int) -> bool:
    """Whether VMEM holds what `backward` needs: both matrices, their gradients and a tile.

    Args:
        channels: of a group of pixels, `pixels` times the map's.
        hidden: of the hidden layer of a group of pixels.
        pixels: in a group.
    """
    matrices = channels * hidden * (2 * 2 + 2 * 4 // pixels**2)  # in bfloat16, and their blocks' gradients in float32
    rows = max(_rows_in_tile(hidden), _IMAGES)
    # Bytes of a tile's row and of all that is computed from it, fitted to what the compiler for v5e reports.
    return matrices + rows * (8 * hidden + 44 * channels) <= tpu_tiles.VMEM_BYTES


def _rows_in_tile(hidden: int) -> int:
    return min(_ROWS, _HIDDEN_NUMBERS // hidden)


def forward(
    maps: tuple[_Map], vectors: tuple[_PerImage, _PerImage, _PerImage], weights: _Weights, *, interpret: bool
) -> tuple[_Map, tuple[_PerImageAndChannel, _PerImageAndChannel], tuple[()]]:
    """The branch with its input, `y = x + keep * mlp((x - mean) * inverse_std)`.

    Args:
        maps: (x), bfloat16, [height, width, batch, channels].
        vectors: (mean, inverse_std, keep); keep is the branch's factor.
        weights: kernel1 and kernel2 in bfloat16, bias1 and bias2 in float32.
        interpret: compute on any platform.

    Returns:
        `y`, and the sums of `y - mean` and of its square over all positions.
    """
    (x,), (kernel1, bias1, kernel2, bias2) = maps, weights

    def kernel(
        x_ref: Any, mean_ref: Any, inverse_std_ref: Any, keep_ref: Any, w1: Any, b1: Any, w2: Any, b2: Any,
        y_ref: Any, sum_ref: Any, square_ref: Any,
    ) -> None:  # fmt: skip
        tpu_tiles.zero_if(pl.program_id(1) == 0, sum_ref, square_ref)
        x, mean = x_ref[...].astype(jnp.float32), mean_ref[...]
        standard = rows_of(((x - mean) * inverse_std_ref[...]).astype(x_ref.dtype))
        hidden, _ = gelu_fit(product(standard, w1[...]) + b1[...])
        branch = product(hidden.astype(x_ref.dtype), w2[...]) + b2[...]
        y = (x + branch.reshape(x.shape) * keep_ref[...]).astype(y_ref.dtype)
        y_ref[...] = y
        distance = y.astype(jnp.float32) - mean
        sum_ref[...] += distance.sum(0)
        square_ref[...] += (distance * distance).sum(0)

    tile, rows = _Tile(x, kernel1), by_position(x)
    sums = tpu_tiles.output(x.shape[2:])
    matrices = kernel1, bias1[None], kernel2, bias2[None]
    results = [tpu_tiles.output(rows.shape, x.dtype), sums, sums]
    hidden = math.prod(rows.shape[:2]) * kernel1.shape[1]
    y, total, squares = pl.pallas_call(
        kernel,
        name="mlp_forward",
        in_specs=[tile.map, *[tile.column] * 3, *map(tpu_tiles.whole, matrices)],
        out_specs=[tile.map, tile.vectors, tile.vectors],
        out_shape=results,
        interpret=interpret,
        **tpu_tiles.options(
            "parallel",
            "arbitrary",
            grid=tile.grid,
            flops=2 * 2 * hidden * x.shape[3],
            transcendentals=hidden,
            arrays=[x, *matrices, *results],
        ),
    )(rows, *(vector[:, None] for vector in vectors), *matrices)
    return y.reshape(x.shape), (total, squares), ()


def backward(
    maps: tuple[_Map, _Map, _Map],
    vectors: tuple[_PerImage, _PerImage, _PerImage, _PerImage, _PerImage],
    weights: _Weights,
    *,
    pixels: int,
    interpret: bool,
) -> tuple[_Map, tuple[_PerImageAndChannel, _PerImageAndChannel], _WeightGradients]:
    """The gradient of `forward`, where the gradient of `y` is `dy + slope * y + offset`.

    Args:
        maps: (x, y, dy).
        vectors: (mean, inverse_std, keep, slope, offset).
        weights: as in `forward`.
        pixels: in a group; the matrices have a diagonal block for each, and only these blocks' gradients are computed,
            as one sum.
        interpret: as in `forward`.

    Returns:
        `dx` with mean and inverse_std held fixed; the sums of `dz` and of `z * dz` over all positions, where
        `z = (x - mean) * inverse_std`; and the weights' gradients without blocks, in float32.
    """
    (x, _, _), (kernel1, bias1, kernel2, _) = maps, weights
    hidden_size = kernel1.shape[1]

    def kernel(
        x_ref: Any, y_ref: Any, dy_ref: Any, mean_ref: Any, inverse_std_ref: Any, keep_ref: Any, slope_ref: Any,
        offset_ref: Any, w1: Any, b1: Any, w2: Any,
        dx_ref: Any, sum_ref: Any, product_ref: Any, dw1_ref: Any, db1_ref: Any, dw2_ref: Any, db2_ref: Any,
    ) -> None:  # fmt: skip
        first_of_image = pl.program_id(1) == 0
        tpu_tiles.zero_if(first_of_image, sum_ref, product_ref)
        tpu_tiles.zero_if(first_of_image & (pl.program_id(0) == 0), dw1_ref, db1_ref, dw2_ref, db2_ref)
        dtype, wide = x_ref.dtype, jnp.float32
        dy = dy_ref[...].astype(wide) + y_ref[...].astype(wide) * slope_ref[...] + offset_ref[...]
        standard_map = (x_ref[...].astype(wide) - mean_ref[...]) * inverse_std_ref[...]
        standard, dbranch = rows_of(standard_map.astype(dtype)), rows_of((dy * keep_ref[...]).astype(dtype))

        hidden, dgelu = gelu_fit(product(standard, w1[...]) + b1[...])
        dinner = product(dbranch, w2[...], transpose_right=True) * dgelu
        hidden, dinner_rounded = hidden.astype(dtype), dinner.astype(dtype)
        dstandard = product(dinner_rounded, w1[...], transpose_right=True).reshape(dy.shape)
        dx_ref[...] = (dy + dstandard * inverse_std_ref[...]).astype(dtype)

        sum_ref[...] += dstandard.sum(0)
        product_ref[...] += (dstandard * standard_map).sum(0)
        dw1_ref[...] += _product_of_blocks(standard, dinner_rounded, pixels)
        db1_ref[...] += tpu_tiles.sum_to_register(dinner)
        dw2_ref[...] += _product_of_blocks(hidden, dbranch, pixels)
        db2_ref[...] += tpu_tiles.sum_to_register(dbranch.astype(wide))

    tile, rows, channels = _Tile(x, kernel1), [by_position(z) for z in maps], x.shape[3]
    sums, matrices = [tpu_tiles.output(x.shape[2:])] * 2, (kernel1, bias1[None], kernel2)
    gradients = [
        tpu_tiles.output((channels // pixels, hidden_size // pixels)),
        tpu_tiles.output((SUBLANES, hidden_size)),
        tpu_tiles.output((hidden_size // pixels, channels // pixels)),
        tpu_tiles.output((SUBLANES, channels)),
    ]
    results = [tpu_tiles.output(rows[0].shape, x.dtype), *sums, *gradients]
    hidden = math.prod(rows[0].shape[:2]) * hidden_size
    dx, total, products, dkernel1, dbias1, dkernel2, dbias2 = pl.pallas_call(
        kernel,
        name="mlp_backward",
        in_specs=[*[tile.map] * 3, *[tile.column] * 5, *map(tpu_tiles.whole, matrices)],
        out_specs=[tile.map, tile.vectors, tile.vectors, *map(tpu_tiles.whole, gradients)],
        out_shape=results,
        interpret=interpret,
        **tpu_tiles.options(
            "arbitrary",
            "arbitrary",
            grid=tile.grid,
            flops=2 * hidden * (3 * channels + 2 * channels // pixels),
            transcendentals=hidden,
            arrays=[*maps, *matrices, *results],
        ),
    )(*rows, *(vector[:, None] for vector in vectors), *matrices)
    dbias1, dbias2 = (partial_sums.reshape(SUBLANES * pixels, -1).sum(0) for partial_sums in (dbias1, dbias2))
    return dx.reshape(x.shape), (total, products), (dkernel1, dbias1, dkernel2, dbias2)


class _Tile:
    """The grid over images, then positions, and the blocks that a tile reads and writes."""

    def __init__(self, x: _Map, kernel1: _Kernel1) -> None:
        height, width, batch, channels = x.shape
        images = tpu_tiles.images_in_tile(batch, _IMAGES)
        positions = largest_divisor(height * width, _rows_in_tile(kernel1.shape[1]) // images)
        self.grid = batch // images, height * width // positions
        self.map = pl.BlockSpec((positions, images, channels), lambda image, position: (position, image, 0))
        self.vectors = pl.BlockSpec((images, channels), lambda image, position: (image, 0))
        self.column = pl.BlockSpec((images, 1), lambda image, position: (image, 0))


def _product_of_blocks(left: Float[Array, "rows c"], right: Float[Array, "rows d"], pixels: int) -> Array:
    """The sum of `left.T @ right` over the pixels of a group."""
    products = (
        product(a, b, transpose_left=True) for a, b in zip(jnp.split(left, pixels, 1), jnp.split(right, pixels, 1))
    )
    total = next(products)
    for one in products:
        total += one
    return total

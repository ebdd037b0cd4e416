"""The pooling branch, forward and backward, as TPU kernels.

A tile holds a few rows of some images, and reads one row above and below. The kernel computes row by row, from left to
right: it sums each column of three once, and adds three such sums for each window, all in registers. Windows are 3 x 3
and count only the pixels inside the image.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from poolformer_jax.network.fused.cpu_batching import largest_divisor
from poolformer_jax.network.fused.kernels import tpu_tiles

_ROW_BYTES = 6 * 2**20  # most bytes of one map in a tile
_NUMBERS_AT_ONCE = 2**13  # one position of a tile: eight registers in float32

_Map = Float[Array, "h w b c"]
_PerImage = Float[Array, " b"]
_PerImageAndChannel = Float[Array, "b c"]
# For a column's index: the value in the current row, and the sum over the column of three around it.
_Column = Callable[[int], tuple[Array, Array]]


def forward(
    maps: tuple[_Map], vectors: tuple[_PerImage, _PerImageAndChannel], _: tuple[()], *, pixels: int, interpret: bool
) -> tuple[_Map, tuple[_PerImageAndChannel, _PerImageAndChannel], tuple[()]]:
    """The branch with its input, `y = x + scale * (pool(x) - x)`.

    Args:
        maps: (x), bfloat16, [height, width / pixels, batch, pixels * channels].
        vectors: (mean, scale): a value near the mean of each image of `y`, and the branch's factor.
        pixels: neighbours of a row in a group.
        interpret: compute on any platform.

    Returns:
        `y`, and the sums of `y - mean` and of its square over all positions.
    """
    (x,), (mean, scale) = maps, vectors
    height = x.shape[0]

    def kernel(x_ref: Any, mean_ref: Any, scale_ref: Any, y_ref: Any, sum_ref: Any, square_ref: Any) -> None:
        tpu_tiles.zero_if(pl.program_id(1) == 0, sum_ref, square_ref)
        first, scale = pl.program_id(1) * y_ref.shape[0], scale_ref[...]
        pivot = jnp.broadcast_to(mean_ref[...], scale.shape)

        def compute_row(index: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            row = _Row.of(first, index, x_ref.shape[0], height)

            def column(j: int) -> tuple[Array, Array]:
                own, above, below = (x_ref[k, j].astype(jnp.float32) for k in (row.own, row.above, row.below))
                return own, own + above * row.has_above + below * row.has_below

            total, squares = sums
            for j, own, window in _windows(column, y_ref.shape[1], pixels):
                mixed = (
                    window * (row.inverse_count(0) * _inverse_column_count(j, y_ref.shape[1], pixels, scale.shape))
                    - own
                )
                y = (own + mixed * scale).astype(y_ref.dtype)
                y_ref[index, j] = y
                distance = y.astype(jnp.float32) - pivot
                total, squares = total + distance, squares + distance * distance
            return total, squares

        zeros = jnp.zeros_like(scale)
        total, squares = lax.fori_loop(0, y_ref.shape[0], compute_row, (zeros, zeros))
        sum_ref[...] += total
        square_ref[...] += squares

    tile = _Tile(x)
    sums = tpu_tiles.output(scale.shape)
    results = [tpu_tiles.output(x.shape, x.dtype), sums, sums]
    y, total, squares = pl.pallas_call(
        kernel,
        name="pooling_forward",
        in_specs=[tile.with_neighbours, tile.column, tile.vectors],
        out_specs=[tile.map, tile.vectors, tile.vectors],
        out_shape=results,
        interpret=interpret,
        **tile.options(14, [x, scale, *results]),
    )(x, mean[:, None], scale)
    return y, (total, squares), ()


def backward(
    maps: tuple[_Map, _Map, _Map],
    vectors: tuple[_PerImage, _PerImage, _PerImageAndChannel],
    _: tuple[()],
    *,
    pixels: int,
    interpret: bool,
) -> tuple[_Map, tuple[_PerImageAndChannel], tuple[()]]:
    """The gradient of `forward` by `x`, where the gradient of `y` is `dy + slope * y + offset`.

    Args:
        maps: (x, y, dy).
        vectors: (slope, offset, scale).
        pixels: as in `forward`.
        interpret: as in `forward`.

    Returns:
        `dx`, and the sum of `x * mixed` over all positions, where `mixed` is the transpose of `pool(z) - z` at the
        gradient of `y`.
    """
    (x, y, dy), (slope, offset, scale) = maps, vectors
    height = x.shape[0]

    def kernel(
        x_ref: Any, y_ref: Any, dy_ref: Any, slope_ref: Any, offset_ref: Any, scale_ref: Any, dx_ref: Any, sum_ref: Any
    ) -> None:
        tpu_tiles.zero_if(pl.program_id(1) == 0, sum_ref)
        first, scale = pl.program_id(1) * dx_ref.shape[0], scale_ref[...]
        slope, offset = (jnp.broadcast_to(ref[...], scale.shape) for ref in (slope_ref, offset_ref))

        def compute_row(index: Array, total: Array) -> Array:
            row = _Row.of(first, index, y_ref.shape[0], height)
            inverse_counts = (
                row.inverse_count(0),
                row.inverse_count(-1) * row.has_above,
                row.inverse_count(1) * row.has_below,
            )

            def column(j: int) -> tuple[Array, Array]:
                own, above, below = (
                    dy_ref[k, j].astype(jnp.float32) + y_ref[k, j].astype(jnp.float32) * slope + offset
                    for k in (row.own, row.above, row.below)
                )
                in_column = own * inverse_counts[0] + above * inverse_counts[1] + below * inverse_counts[2]
                return own, in_column * _inverse_column_count(j, dx_ref.shape[1], pixels, scale.shape)

            for j, own, window in _windows(column, dx_ref.shape[1], pixels):
                mixed = window - own
                dx_ref[index, j] = (own + mixed * scale).astype(dx_ref.dtype)
                total = total + x_ref[index, j].astype(jnp.float32) * mixed
            return total

        sum_ref[...] += lax.fori_loop(0, dx_ref.shape[0], compute_row, jnp.zeros_like(scale))

    tile = _Tile(x)
    results = [tpu_tiles.output(x.shape, x.dtype), tpu_tiles.output(scale.shape)]
    dx, total = pl.pallas_call(
        kernel,
        name="pooling_backward",
        in_specs=[tile.map, tile.with_neighbours, tile.with_neighbours, tile.column, tile.column, tile.vectors],
        out_specs=[tile.map, tile.vectors],
        out_shape=results,
        interpret=interpret,
        **tile.options(22, [x, y, dy, scale, *results]),
    )(x, y, dy, slope[:, None], offset[:, None], scale)
    return dx, (total,), ()


class _Tile:
    """The grid over images, then rows, and the blocks that a tile reads and writes."""

    def __init__(self, x: _Map) -> None:
        height, width, batch, channels = x.shape
        images = tpu_tiles.images_in_tile(batch, _NUMBERS_AT_ONCE // channels)
        rows = largest_divisor(height, _ROW_BYTES // (width * images * channels * x.dtype.itemsize))
        read = min(rows + 2, height)

        def start(image: Array, row: Array) -> tuple[Any, ...]:
            return _first_read(row * rows, read, height), 0, image * images, 0

        self._size, self._rows, self._grid = x.size, rows, (batch // images, height // rows)
        self.map = pl.BlockSpec((rows, width, images, channels), lambda image, row: (row, 0, image, 0))
        self.with_neighbours = pl.BlockSpec(tuple(map(pl.Element, (read, width, images, channels))), start)
        self.vectors = pl.BlockSpec((images, channels), lambda image, row: (image, 0))
        self.column = pl.BlockSpec((images, 1), lambda image, row: (image, 0))

    def options(self, flops: int, arrays: list[Any]) -> dict[str, Any]:
        """`tpu_tiles.options` of a kernel with `flops` operations per number of a map."""
        return tpu_tiles.options(
            "parallel", "arbitrary", grid=self._grid, rounds=self._rows, flops=flops * self._size, arrays=arrays
        )


class _Row(NamedTuple):
    """A row of the image and its neighbours: their indices in a tile, and whether the neighbours exist."""

    number: Array
    height: int
    own: Array
    above: Array
    below: Array
    has_above: Array
    has_below: Array

    @classmethod
    def of(cls, first: Array, index: Array, read: int, height: int) -> "_Row":
        """Row `first + index` of a tile that writes rows from `first` on and reads `read` rows of `height`."""
        number = first + index
        own = number - _first_read(first, read, height)
        return cls(
            number,
            height,
            own,
            jnp.maximum(own - 1, 0),
            jnp.minimum(own + 1, read - 1),
            jnp.where(number == 0, 0.0, 1.0),
            jnp.where(number == height - 1, 0.0, 1.0),
        )

    def inverse_count(self, distance: int) -> Array:
        """1 / rows in the window around the row that is `distance` rows below."""
        number = self.number + distance
        at_border = (number == 0) | (number == self.height - 1)
        return jnp.where(at_border, 1 / min(2, self.height), 1 / 3)


def _first_read(first: Array, read: int, height: int) -> Array:
    """The first row that a tile reads: the one above `first`, or the image's first."""
    return jnp.clip(first - 1, 0, height - read)


def _inverse_column_count(j: int, width: int, pixels: int, shape: tuple[int, ...]) -> float | Array:
    """1 / columns in the windows around column `j`."""
    if j not in (0, width - 1):
        return 1 / 3
    if pixels == 1:
        return 1 / 2
    # One of the group's two pixels is the image's first or last.
    at_border = _left_pixel(shape) if j == 0 else ~_left_pixel(shape)
    return jnp.where(at_border, 1 / 2, 1 / 3)


def _left_pixel(shape: tuple[int, ...]) -> Array:
    return lax.broadcasted_iota(jnp.int32, shape, 1) < shape[1] // 2


def _windows(column: _Column, width: int, pixels: int) -> Iterator[tuple[int, Array, Array]]:
    """(j, value at j, sum over the window around j) for each position of a row."""
    left, (own, here) = None, column(0)
    for j in range(width - 1):
        next_own, right = column(j + 1)
        yield j, own, _sum_columns(left, here, right, pixels)
        left, here, own = here, right, next_own
    yield width - 1, own, _sum_columns(left, here, None, pixels)


def _sum_columns(left: Array | None, here: Array, right: Array | None, pixels: int) -> Array:
    """The sum of three neighbouring columns; if two pixels share a position, for each of them."""
    left, right = (jnp.zeros_like(here) if side is None else side for side in (left, right))
    if pixels == 1:
        return left + here + right
    # A pixel's neighbours are the other one of its group, and the nearer pixel of the next group.
    swapped_left, swapped_here, swapped_right = (pltpu.roll(z, z.shape[1] // 2, 1) for z in (left, here, right))
    return here + swapped_here + jnp.where(_left_pixel(here.shape), swapped_left, swapped_right)

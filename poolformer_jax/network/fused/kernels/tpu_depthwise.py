"""The depthwise convolution of sep_conv mixers, forward and backward, as TPU kernels.

A convolution is a sum of shifted maps, each multiplied with one entry of the kernel. In the kernels' order a register
holds images and channels, so a shift is another address. XLA computes products with mostly zeros instead.

A tile holds a few rows of 16 images and the rows around them that a window reaches. The kernel computes a few positions
of a row at a time, whose sums stay in registers.
"""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from poolformer_jax.network.fused.cpu_batching import largest_divisor
from poolformer_jax.network.fused.kernels import tpu_tiles
from poolformer_jax.network.fused.kernels.base import TPU_IMAGES

_LANES, _SUBLANES = 128, 8
_TILE_BYTES = 8 * 2**20  # most bytes of one map in a tile
_FORWARD_POSITIONS, _BACKWARD_POSITIONS = 14, 7  # whose sums are in registers at a time

_Map = Float[Array, "h w b c"]
_Kernel = Float[Array, "k k 1 c"]


def forward(
    maps: tuple[_Map], _: tuple[()], replicated: tuple[_Kernel], *, interpret: bool
) -> tuple[_Map, tuple[()], tuple[()]]:
    """The convolution with stride 1 and zeros around the map.

    Args:
        maps: (x), bfloat16, [height, width, batch, channels].
        replicated: (kernel), float32, [size, size, 1, channels]; the size is odd.
        interpret: compute on any platform.
    """
    (x,), (kernel,) = maps, replicated
    tile, size = _Tile(x, len(kernel)), len(kernel)

    def compute_tile(x_ref: Any, kernel_ref: Any, y_ref: Any) -> None:
        number = pl.program_id(2)

        def compute_row(row: Array, _: None) -> None:
            for start, positions in tile.parts_of_row(_FORWARD_POSITIONS):
                sums: list[Any] = [0.0] * positions
                for i in range(size):
                    source, inside = tile.row_below(number, row, i - size // 2)
                    taps = [kernel_ref[i, j] * inside for j in range(size)]
                    for column, x in tile.columns(x_ref, source, start, positions):
                        for position, j in tile.windows_with(column, start, positions):
                            sums[position] += x * taps[j]
                for position, total in enumerate(sums):
                    y_ref[row, start + position] = total.astype(y_ref.dtype)

        lax.fori_loop(0, tile.rows, compute_row, None)

    result = tpu_tiles.output(x.shape, x.dtype)
    y = pl.pallas_call(
        compute_tile,
        name="depthwise_forward",
        in_specs=[tile.with_neighbours, tile.kernel],
        out_specs=tile.map,
        out_shape=_output_in_hbm(x, interpret),
        interpret=interpret,
        **tile.options(2 * size**2, [x, kernel, result]),
    )(_in_hbm(x, interpret), kernel)
    return y, (), ()


def backward(
    maps: tuple[_Map, _Map], _: tuple[()], replicated: tuple[_Kernel], *, interpret: bool
) -> tuple[_Map, tuple[()], _Kernel]:
    """The gradients of `forward` by the map and by the kernel.

    Args:
        maps: (x, dy).
        replicated: as in `forward`.
        interpret: as in `forward`.
    """
    (x, dy), (kernel,) = maps, replicated
    tile, size = _Tile(x, len(kernel)), len(kernel)

    def compute_tile(x_ref: Any, dy_ref: Any, kernel_ref: Any, dx_ref: Any, dkernel_ref: Any) -> None:
        number = pl.program_id(2)
        tpu_tiles.zero_if((pl.program_id(1) == 0) & (number == 0), dkernel_ref)

        def compute_row(row: Array, _: None) -> None:
            for start, positions in tile.parts_of_row(_BACKWARD_POSITIONS):
                sums: list[Any] = [0.0] * positions
                x = [x_ref[row, start + position].astype(jnp.float32) for position in range(positions)]
                for i in range(size):
                    source, inside = tile.row_below(number, row, size // 2 - i)
                    taps = [kernel_ref[i, j] * inside for j in range(size)]
                    products: list[Any] = [0.0] * size
                    for column, dy in tile.columns(dy_ref, source, start, positions):
                        for position, j in tile.windows_with(column, start, positions):
                            j = size - 1 - j
                            sums[position] += dy * taps[j]
                            products[j] += dy * x[position]
                    for j, product in enumerate(products):
                        if not isinstance(product, float):
                            dkernel_ref[i, j] += product.reshape(-1, _SUBLANES, product.shape[-1]).sum(0) * inside
                for position, total in enumerate(sums):
                    dx_ref[row, start + position] = total.astype(dx_ref.dtype)

        lax.fori_loop(0, tile.rows, compute_row, None)

    results = [tpu_tiles.output(x.shape, x.dtype), tpu_tiles.output((size, size, _SUBLANES, x.shape[3]))]
    dx, dkernel = pl.pallas_call(
        compute_tile,
        name="depthwise_backward",
        in_specs=[tile.map, tile.with_neighbours, tile.kernel],
        out_specs=[tile.map, tile.kernel_gradient],
        out_shape=[_output_in_hbm(x, interpret), *results[1:]],
        interpret=interpret,
        **tile.options(4 * size**2, [x, dy, kernel, *results]),
    )(_in_hbm(x, interpret), _in_hbm(dy, interpret), kernel)
    return dx, (), dkernel.sum(2, keepdims=True)


def _in_hbm(x: _Map, interpret: bool) -> _Map:
    """`x` in HBM. If XLA puts it or the result into VMEM, the kernel's schedule is half as long again."""
    constrained: Array = x if interpret else pltpu.with_memory_space_constraint(x, pltpu.HBM)
    return constrained


def _output_in_hbm(x: _Map, interpret: bool) -> Any:
    """A result like `x`, in HBM."""
    return tpu_tiles.output(x.shape, x.dtype) if interpret else pltpu.HBM(x.shape, x.dtype)


class _Tile:
    """The grid over channels, images and rows, the blocks that a tile reads and writes, and windows in it.

    Attributes:
        rows: that a tile writes.
    """

    def __init__(self, x: _Map, size: int) -> None:
        self._height, self._width, batch, channels = x.shape
        self._margin = size // 2
        block, row_bytes = (TPU_IMAGES, _LANES), self._width * TPU_IMAGES * _LANES * x.dtype.itemsize
        self.rows = rows = largest_divisor(self._height, _TILE_BYTES // row_bytes)
        self._read = min(rows + 2 * self._margin, self._height)
        self._size, self._grid = x.size, (pl.cdiv(channels, _LANES), batch // TPU_IMAGES, self._height // rows)
        self.map = pl.BlockSpec((rows, self._width, *block), lambda channel, image, row: (row, 0, image, channel))
        self.with_neighbours = pl.BlockSpec(
            tuple(map(pl.Element, (self._read, self._width, *block))),
            lambda channel, image, row: (self._first_read(row), 0, image * TPU_IMAGES, channel * _LANES),
        )
        self.kernel, self.kernel_gradient = (
            pl.BlockSpec((size, size, rows, _LANES), lambda channel, image, row: (0, 0, 0, channel))
            for rows in (1, _SUBLANES)
        )

    def options(self, flops: int, arrays: list[Any]) -> dict[str, Any]:
        """`tpu_tiles.options` of a kernel with `flops` operations per number of a map."""
        axes: tuple[tpu_tiles.Axis, ...] = ("parallel", "arbitrary", "arbitrary")
        return tpu_tiles.options(*axes, grid=self._grid, rounds=self.rows, flops=flops * self._size, arrays=arrays)

    def row_below(self, tile: Array, row: Array, distance: int) -> tuple[Array, Array]:
        """The index, in what a tile reads, of the row `distance` rows below; and 1.0, or 0.0 outside the image."""
        number = tile * self.rows + row + distance
        inside = (number >= 0) & (number < self._height)
        index = jnp.clip(number, 0, self._height - 1) - self._first_read(tile)
        return index, jnp.where(inside, 1.0, 0.0)

    def parts_of_row(self, positions: int) -> list[tuple[int, int]]:
        """(first position, number of positions) of parts of about `positions` positions each."""
        return [(start, min(positions, self._width - start)) for start in range(0, self._width, positions)]

    def columns(self, ref: Any, row: Array, start: int, positions: int) -> Iterator[tuple[int, Array]]:
        """The columns that windows around the positions from `start` on reach, and their values in a row."""
        for column in range(max(0, start - self._margin), min(self._width, start + positions + self._margin)):
            yield column, ref[row, column].astype(jnp.float32)

    def windows_with(self, column: int, start: int, positions: int) -> Iterator[tuple[int, int]]:
        """(position from `start` on, the column's place in that position's window) of all windows with a column."""
        for position in range(positions):
            place = column - (start + position) + self._margin
            if 0 <= place <= 2 * self._margin:
                yield position, place

    def _first_read(self, tile: Array) -> Array:
        return jnp.clip(tile * self.rows - self._margin, 0, self._height - self._read)

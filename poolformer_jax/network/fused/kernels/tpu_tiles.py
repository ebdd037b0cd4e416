"""The layout of maps for the kernels, and tiles that fit into VMEM."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from poolformer_jax.network.fused import tpu_layout
from poolformer_jax.network.fused.cpu_batching import largest_divisor
from poolformer_jax.network.fused.kernels.base import TPU_IMAGES

Axis = Literal["parallel", "arbitrary"]

VMEM_BYTES = 100 * 2**20  # of 128, for everything that a kernel holds at a time
SUBLANES = 8  # rows in a register of float32


def positions_first(x: Float[Array, "b h w c"], pixels: int) -> Float[Array, "h w2 b c2"]:
    """A map in the kernels' order, with groups of `pixels` in the lanes. XLA uses this layout anyway."""
    return tpu_layout.group_pixels(x, pixels).transpose(1, 2, 0, 3)


def batch_first(x: Float[Array, "h w2 b c2"], pixels: int) -> Float[Array, "b h w c"]:
    """The inverse of `positions_first`."""
    return tpu_layout.ungroup_pixels(x.transpose(2, 0, 1, 3), pixels)


def by_position(x: Float[Array, "h w b c"]) -> Float[Array, "n b c"]:
    """A map in the kernels' order, with one axis for its positions."""
    return x.reshape(-1, *x.shape[2:])


def rows_of(x: Float[Array, "n b c"]) -> Float[Array, "rows c"]:
    """A tile of maps as a matrix."""
    return x.reshape(-1, x.shape[2])


def product(left: Array, right: Array, transpose_left: bool = False, transpose_right: bool = False) -> Array:
    """The matrix product in float32."""
    contract = ((0 if transpose_left else 1,), (1 if transpose_right else 0,))
    return lax.dot_general(left, right, (contract, ((), ())), preferred_element_type=jnp.float32)


def sum_to_register(rows: Float[Array, "rows c"]) -> Float[Array, "sublanes c"]:
    """The sums of every SUBLANES-th row, which add whole registers; their sum over the first axis is the total."""
    return rows.reshape(-1, SUBLANES, rows.shape[1]).sum(0)


def images_in_tile(batch: int, limit: int) -> int:
    """The number of images in a tile: whole registers, up to `limit`."""
    return TPU_IMAGES * largest_divisor(batch // TPU_IMAGES, limit // TPU_IMAGES)


def output(shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> jax.ShapeDtypeStruct:
    """An array that a kernel returns."""
    return jax.ShapeDtypeStruct(shape, dtype)


def whole(array: Any) -> pl.BlockSpec:
    """The whole array for every tile: loaded once, or summed over all tiles."""
    return pl.BlockSpec(array.shape, lambda *_: (0,) * len(array.shape))


def zero_if(first: Array, *totals: Any) -> None:
    """Zeroes outputs that tiles add to, if `first`. Call it at a kernel's start: a branch splits the schedule."""

    @pl.when(first)
    def _() -> None:
        for total in totals:
            total[...] = jnp.zeros_like(total)


def options(
    *axes: Axis, grid: tuple[int, ...], rounds: int = 1, flops: int, transcendentals: int = 0, arrays: Any
) -> dict[str, Any]:
    """The arguments of every `pallas_call` here that do not depend on what it computes.

    Args:
        axes: of the grid; "parallel", or "arbitrary" if tiles along it add to the same output.
        grid: number of tiles along each axis.
        rounds: iterations of the loop in a tile.
        flops: of the whole call.
        transcendentals: of the whole call.
        arrays: inputs and outputs, each read or written once.
    """
    sizes = (math.prod(array.shape) * jnp.dtype(array.dtype).itemsize for array in arrays)
    return {
        "grid": grid,
        "compiler_params": pltpu.CompilerParams(dimension_semantics=axes, vmem_limit_bytes=VMEM_BYTES),
        "cost_estimate": pl.CostEstimate(flops=flops, transcendentals=transcendentals, bytes_accessed=sum(sizes)),
        # benchmarks/compiled/tpu_program.py reads how often the kernel's loops run.
        "metadata": {"rounds": str(rounds), "tiles": str(math.prod(grid))},
    }

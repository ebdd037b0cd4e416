"""How maps are laid out and cut into tiles that fit into VMEM."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from poolformer_jax.network.fused import tpu_layout
from poolformer_jax.network.fused.cpu_batching import largest_divisor
from poolformer_jax.network.fused.kernels.choice import TPU_IMAGES

Axis = Literal["parallel", "arbitrary"]

VMEM_BYTES = 100 * 2**20  # of 128, for all that a kernel holds at once


def positions_first(x: Float[Array, "b h w c"], pixels: int) -> Float[Array, "h w2 b c2"]:
    """A map in the order that kernels take, groups of `pixels` in the lanes. XLA lays it out so anyway."""
    return tpu_layout.group(x, pixels).transpose(1, 2, 0, 3)


def images_first(x: Float[Array, "h w2 b c2"], pixels: int) -> Float[Array, "b h w c"]:
    """The inverse of `positions_first`."""
    return tpu_layout.ungroup(x.transpose(2, 0, 1, 3), pixels)


def images_in_tile(batch: int, limit: int) -> int:
    """How many images a tile holds: whole registers, up to `limit`."""
    return TPU_IMAGES * largest_divisor(batch // TPU_IMAGES, limit // TPU_IMAGES)


def result(shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> jax.ShapeDtypeStruct:
    """An array that a kernel returns."""
    return jax.ShapeDtypeStruct(shape, dtype)


def whole(array: Any) -> pl.BlockSpec:
    """All of an array for every tile: loaded once, or summed up over all tiles."""
    return pl.BlockSpec(array.shape, lambda *_: (0,) * len(array.shape))


def zero(first: Array, *totals: Any) -> None:
    """Clears outputs that tiles add to, for the `first` one; at a kernel's start, as a branch cuts its schedule."""

    @pl.when(first)
    def _() -> None:
        for total in totals:
            total[...] = jnp.zeros_like(total)


def options(
    *axes: Axis, grid: tuple[int, ...], rounds: int = 1, flops: int, transcendentals: int = 0, arrays: Any
) -> dict[str, Any]:
    """What every `pallas_call` here tells the compiler, besides what it computes.

    Args:
        axes: of the grid: "parallel", or "arbitrary" where one tile adds to what another has left.
        grid: number of tiles along each axis.
        rounds: how often the loop in a tile runs.
        flops: of the whole call.
        transcendentals: of the whole call.
        arrays: everything it reads and writes, once each.
    """
    sizes = (math.prod(array.shape) * jnp.dtype(array.dtype).itemsize for array in arrays)
    return {
        "grid": grid,
        "compiler_params": pltpu.CompilerParams(dimension_semantics=axes, vmem_limit_bytes=VMEM_BYTES),
        "cost_estimate": pl.CostEstimate(flops=flops, transcendentals=transcendentals, bytes_accessed=sum(sizes)),
        # For whoever reads the compiled program: how often the kernel's loops run.
        "metadata": {"rounds": str(rounds), "tiles": str(math.prod(grid))},
    }

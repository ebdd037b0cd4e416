"""How maps are laid out and cut into tiles that fit into VMEM."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from poolformer_jax import lanes
from poolformer_jax.kernels import IMAGES

_VMEM_BYTES = 100 * 2**20


def positions_first(x: Float[Array, "b h w c"], pixels: int) -> Float[Array, "h w2 b c2"]:
    """A map in the order that kernels take, groups of `pixels` in the lanes. XLA lays it out so anyway."""
    return lanes.group(x, pixels).transpose(1, 2, 0, 3)


def images_first(x: Float[Array, "h w2 b c2"], pixels: int) -> Float[Array, "b h w c"]:
    """The inverse of `positions_first`."""
    return lanes.ungroup(x.transpose(2, 0, 1, 3), pixels)


def largest_divisor(number: int, limit: int, unit: int = 1) -> int:
    """The largest multiple of `unit` up to `limit` that divides `number`; `unit` where none does."""
    sizes = range(unit, min(number, limit) + 1, unit)
    return max((size for size in sizes if number % size == 0), default=unit)


def images_in_tile(batch: int, limit: int) -> int:
    """How many images a tile holds: whole registers, up to `limit`."""
    return largest_divisor(batch, limit, IMAGES)


def whole(array: Any) -> pl.BlockSpec:
    """All of an array for every tile: loaded once, or summed up over all tiles."""
    return pl.BlockSpec(array.shape, lambda *_: (0,) * len(array.shape))


def add_up(first: Array, *totals: tuple[Any, Array]) -> None:
    """Adds to what the tiles before have left in the outputs; the `first` one finds nothing."""

    @pl.when(first)
    def _start() -> None:
        for ref, _ in totals:
            ref[...] = jnp.zeros_like(ref)

    for ref, value in totals:
        ref[...] += value


def compiler_params(*axes: str) -> pltpu.CompilerParams:
    """What the grid's axes are: "parallel", or "arbitrary" where one tile adds to what another has left."""
    return pltpu.CompilerParams(dimension_semantics=axes, vmem_limit_bytes=_VMEM_BYTES)

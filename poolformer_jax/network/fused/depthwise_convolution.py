"""The depthwise convolution of sep_conv mixers, with a custom gradient rule, for CPUs.

XLA's convolution with `feature_group_count` takes ten to thirty times as long on a CPU as these sums, and its gradient
by the kernel more. On a TPU a Pallas kernel can replace it (`kernels`). Otherwise this is XLA's convolution with its
gradients.

A convolution is a sum of shifted maps, each multiplied with one entry of the kernel, and so is its gradient by the map.
With few cores it is computed for a few channels at a time, whose kernel then stays in the processor's registers.
The gradient by the kernel is a sum of windows of the map, one for each position, multiplied with the gradient at that
position: again a sum of products that are vectors over channels.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from poolformer_jax.network import functional
from poolformer_jax.network.functional import over_channels, widen
from poolformer_jax.network.fused.cpu_batching import largest_divisor
from poolformer_jax.network.fused.dispatch import run_on_platform
from poolformer_jax.network.fused.kernels.base import Kernels
from poolformer_jax.network.fused.sharding_types import match_varying_axes, partition_spec, with_auto_sharding
from poolformer_jax.resources import available_cores

_Map = Float[Array, "b h w c"]
_Kernel = Float[Array, "k k 1 c"]

# Columns, positions and channels of the tiles in which the kernel's gradient is summed. A tile's windows fit into the
# first cache. XLA fuses the copy of a tile into a sum of up to 15 terms, which then takes ten times as long; and with
# more channels, maps of 1024 of them have all pixels at the same place of the cache.
_TILE_COLUMNS, _TILE_POSITIONS, _TILE_CHANNELS = 7, 28, 128

# A 512-bit register holds 16 channels. Parts of 16 channels are faster than all channels at once on devices with up to
# two cores (docs/notes/speed.md).
_REGISTER_CHANNELS, _CORES_FOR_PARTS = 16, 2


def convolve_depthwise(x: _Map, kernel: _Kernel, kernels: Kernels | None = None) -> _Map:
    """`functional.depthwise_convolution`, which also has a forward-mode derivative; this has none.

    Args:
        x: feature maps.
        kernel: [size, size, 1, channels], float32; the size is odd.
        kernels: compute the passes that they support, on their platform.
    """
    if kernels is not None and not kernels.supports("depthwise_convolution", x.shape, x.dtype, None):
        kernels = None
    convolution = functools.partial(_convolve, kernels)
    return with_auto_sharding(convolution, x, kernel, specs=PartitionSpec(*partition_spec(x)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(kernels: Kernels | None, x: _Map, kernel: _Kernel) -> _Map:
    def run(convolve: Callable[[_Map, _Kernel], _Map], batched: tuple[_Map], replicated: Any, _: Any) -> Any:
        return convolve(*batched, replicated[1]), ()

    platforms = {
        "cpu": functools.partial(run, _convolve_on_cpu),
        "default": functools.partial(run, functional.depthwise_convolution),
    }
    y: Array
    y, _ = run_on_platform(platforms, kernels, "depthwise_convolution", (x,), (None, kernel))
    return y


def _forward(kernels: Kernels | None, x: _Map, kernel: _Kernel) -> tuple[_Map, tuple[_Map, _Kernel]]:
    return _convolve(kernels, x, kernel), (x, kernel)


def _backward(kernels: Kernels | None, residuals: tuple[_Map, _Kernel], dy: _Map) -> tuple[_Map, _Kernel]:
    x, kernel = residuals
    platforms = {"cpu": _gradients_on_cpu, "default": _gradients_of_xla}
    (dx,), dkernel = run_on_platform(platforms, kernels, "depthwise_gradient", (x, dy), (None, kernel))
    return dx, dkernel


_convolve.defvjp(_forward, _backward)


def _convolve_on_cpu(x: _Map, kernel: _Kernel) -> _Map:
    """In parts of the channels, or at once: XLA divides sums among cores only outside of loops."""
    if available_cores() // jax.local_device_count() > _CORES_FOR_PARTS:
        return _shifted_products(x, kernel)
    size = largest_divisor(x.shape[-1], _REGISTER_CHANNELS)

    def convolve_part(part: Array, y: _Map) -> _Map:
        x_part, kernel_part = (lax.dynamic_slice_in_dim(array, part * size, size, axis=3) for array in (x, kernel))
        y_part = _shifted_products(x_part, kernel_part)
        return lax.dynamic_update_slice_in_dim(y, y_part, part * size, axis=3)

    zeros, _ = match_varying_axes((jnp.zeros(x.shape, x.dtype), (x, kernel)))
    y: Array = lax.fori_loop(0, x.shape[-1] // size, convolve_part, zeros)
    return y


def _shifted_products(x: _Map, kernel: _Kernel) -> _Map:
    (_, height, width, _), size = x.shape, len(kernel)
    padded, kernel = _pad(x, size // 2), widen(kernel)
    products = (
        padded[:, i : i + height, j : j + width] * over_channels(kernel[i, j, 0], padded)
        for i in range(size)
        for j in range(size)
    )
    return _sum(products).astype(x.dtype)


# These two return the gradients by the map and by the kernel, as the kernels for TPUs do.
def _gradients_of_xla(maps: tuple[_Map, _Map], replicated: Any, _: Any) -> tuple[tuple[_Map], _Kernel]:
    x, dy = maps
    _, vjp = jax.vjp(functional.depthwise_convolution, x, replicated[1])
    dx, dkernel = vjp(dy)
    return (dx,), dkernel


def _gradients_on_cpu(maps: tuple[_Map, _Map], replicated: Any, _: Any) -> tuple[tuple[_Map], _Kernel]:
    (x, dy), (_, kernel) = maps, replicated
    dx = _convolve_on_cpu(dy, kernel[::-1, ::-1])
    return (dx,), _kernel_gradient_on_cpu(x, dy, len(kernel)).astype(kernel.dtype)


def _kernel_gradient_on_cpu(x: _Map, dy: _Map, size: int) -> _Kernel:
    images, height, width, channels = x.shape
    columns = _even_parts(width, _TILE_COLUMNS)
    rows = _even_parts(height, -(-_TILE_POSITIONS // columns))
    across, down, deep = -(-width // columns), -(-height // rows), largest_divisor(channels, _TILE_CHANNELS)
    # Whole tiles: the gradient is zero outside the map.
    missing = (down * rows - height, across * columns - width)
    padded = _pad(x, size // 2, missing)
    dy = lax.optimization_barrier(_pad(dy, 0, missing))

    def of_channels(block: Array) -> Array:
        def add_tile(total: Array, tile: Array) -> tuple[Array, None]:
            image, place = tile // (down * across), tile % (down * across)
            start = (image, place // across * rows, place % across * columns, block * deep)
            windows = lax.dynamic_slice(padded, start, (1, rows + size - 1, columns + size - 1, deep))[0]
            gradient = lax.dynamic_slice(dy, start, (1, rows, columns, deep))[0]
            products = (
                windows[i : i + size, j : j + size] * gradient[i : i + 1, j : j + 1]
                for i in range(rows)
                for j in range(columns)
            )
            return _sum((total, *products)), None

        zeros, _ = match_varying_axes((jnp.zeros((size, size, deep), padded.dtype), padded))
        total: Array
        total, _ = lax.scan(add_tile, zeros, jnp.arange(images * down * across))
        return total

    blocks = lax.map(of_channels, jnp.arange(channels // deep))
    return jnp.moveaxis(blocks, 0, 2).reshape(size, size, 1, channels)


def _pad(x: _Map, margin: int, more: tuple[int, int] = (0, 0)) -> Float[Array, "b h2 w2 c"]:
    """A wider copy with zeros around it; without the barrier, every read would compare its position with the edges."""
    sides = [(margin, margin + extra) for extra in more]
    padded: Array = lax.optimization_barrier(jnp.pad(widen(x), [(0, 0), *sides, (0, 0)]))
    return padded


def _even_parts(length: int, limit: int) -> int:
    """The length of the parts if `length` is divided into as few parts of up to `limit` as possible."""
    return -(-length // -(-length // limit))


def _sum(terms: Iterable[Array]) -> Array:
    total: Array = functools.reduce(jnp.add, terms)
    return total

"""Feature maps with fewer channels than a TPU has lanes, held so that the lanes are full.

A TPU lays the last axis out over 128 lanes. The first stage of s12, s24 and s36 has 64 channels: half of every
register, of every transfer and of the matrix unit would hold padding. So neighbouring pixels of a row share the lanes:
a map [b, h, w, c] is held as [b, h, w / n, n * c], which is the same array read differently. Norms and residuals do
not care, a dense layer becomes a block-diagonal one, and a convolution becomes one of another kernel, with zeros where
a pixel of the group lies outside the window. The zeros cost nothing: they take the place of padding.

Every function here takes and returns plain maps at its border, or is told the number of pixels in a group, `n`. XLA
drops the reshapes between one function's end and the next one's start, so that a map stays grouped from the stem to
the downsampling.
"""

import dataclasses
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from poolformer_jax.network import functional
from poolformer_jax.network.fused import cpu_batching

LANES = 128

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def group_size(width: int, channels: int, dtype: Any) -> int:
    """How many pixels of a row fill the lanes, or 1 where none do or for 32 bits, whose sums a TPU would round."""
    pixels, rest = divmod(LANES, channels)
    return pixels if jnp.dtype(dtype).itemsize < 4 and rest == 0 and width % pixels == 0 else 1


def group(x: Float[Array, "b h w c"], pixels: int) -> Float[Array, "b h w2 c2"]:
    """[b, h, w, c] as [b, h, w / n, n * c]."""
    b, h, w, c = x.shape
    return x.reshape(b, h, w // pixels, pixels, c).reshape(b, h, w // pixels, pixels * c)


def ungroup(x: Float[Array, "b h w2 c2"], pixels: int) -> Float[Array, "b h w c"]:
    """The inverse of `group`."""
    b, h, w, c = x.shape
    return x.reshape(b, h, w, pixels, c // pixels).reshape(b, h, w * pixels, c // pixels)


def dense(pixels: int, x: Float[Array, "b h w2 c2"], kernel: Float[Array, "c d"]) -> Float[Array, "b h w2 d2"]:
    """`x @ kernel` for each pixel of a group."""
    if pixels == 1:
        return x @ kernel
    # As a convolution the TPU compiler puts batch and channels into the tiles and fuses what surrounds it; for a
    # matrix product with three batch axes it takes rows and channels, and copies whole maps.
    blocks = jnp.kron(jnp.eye(pixels, dtype=kernel.dtype), kernel)
    return lax.conv_general_dilated(x, blocks[None, None], (1, 1), "VALID", dimension_numbers=_DIMENSIONS)


def dense_gradient(pixels: int, x: Float[Array, "b h w2 c2"], dy: Float[Array, "b h w2 d2"]) -> Float[Array, "c d"]:
    """The gradient of `dense` by its kernel, `x.T @ dy` over all positions, summed in at least float32."""
    accumulator = functional.wide_type(x.dtype)
    blocks = lax.platform_dependent(
        x,
        dy,
        cpu=partial(cpu_batching.kernel_gradient, dtype=accumulator),
        default=lambda x, dy: lax.dot_general(
            x, dy, (((0, 1, 2), (0, 1, 2)), ((), ())), preferred_element_type=accumulator
        ),
    )
    c, d = blocks.shape
    return jnp.einsum("icid->cd", blocks.reshape(pixels, c // pixels, pixels, d // pixels))


def per_pixel(vector: Float[Array, " c"], pixels: int) -> Float[Array, " c2"]:
    """A vector over channels, once for each pixel of a group."""
    return jnp.tile(vector, pixels)


def over_pixels(vectors: Float[Array, "*b c2"], pixels: int) -> Float[Array, "*b c"]:
    """The sum over the pixels of a group, what `per_pixel` makes of gradients."""
    *batch, channels = vectors.shape
    return vectors.reshape(*batch, pixels, channels // pixels).sum(-2)


def pooling_mixer(pixels: int, x: Float[Array, "b h w2 c2"], pool_size: int) -> Float[Array, "b h w2 c2"]:
    """`functional.pooling_mixer` of a grouped map, in at least float32."""
    wide = functional.widen(x)
    if pixels == 1:
        return functional.pooling_mixer(wide, pool_size)
    return _window_sum(pixels, x, pool_size) / _window_counts(pixels, x, pool_size) - wide


def pooling_mixer_transpose(pixels: int, dy: Float[Array, "b h w2 c2"], pool_size: int) -> Float[Array, "b h w2 c2"]:
    """`functional.pooling_mixer_transpose` of a grouped map, rounded once."""
    wide = functional.widen(dy)
    if pixels == 1:
        return functional.pooling_mixer_transpose(wide, pool_size).astype(dy.dtype)
    # Relative to a whole window: a factor of 1, which rounds nothing, at all pixels but the image's border.
    whole = pool_size**2
    weighted = (wide * (whole / _window_counts(pixels, dy, pool_size))).astype(dy.dtype)
    return (_window_sum(pixels, weighted, pool_size) / whole - wide).astype(dy.dtype)


def _window_sum(pixels: int, x: Float[Array, "b h w2 c2"], pool_size: int) -> Float[Array, "b h w2 c2"]:
    """The sum over each pixel's window, as a convolution: exact products with 0 and 1, summed in float32."""
    margin, channels = pool_size // 2, x.shape[-1] // pixels
    reach = -(-margin // pixels)  # groups to either side that a window can touch
    group, source, target = np.ogrid[-reach : reach + 1, :pixels, :pixels]
    inside = np.abs(group * pixels + source - target) <= margin
    kernel = np.kron(inside, np.eye(channels))[None].repeat(pool_size, axis=0)
    total: Float[Array, "b h w2 c2"] = lax.conv_general_dilated(
        x,
        jnp.asarray(kernel, x.dtype),
        (1, 1),
        ((margin, margin), (reach, reach)),
        dimension_numbers=_DIMENSIONS,
        preferred_element_type=jnp.float32,
    )
    return total


def _window_counts(pixels: int, x: Float[Array, "b h w2 c2"], pool_size: int) -> Float[np.ndarray, "1 h w2 c2"]:
    height, width, channels = x.shape[1], x.shape[2] * pixels, x.shape[3] // pixels
    counts = functional.window_counts(height, width, pool_size).astype(np.float32)
    return counts.reshape(1, height, width // pixels, pixels).repeat(channels, axis=-1)


def convolve(
    x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw c d"], stride: int, padding: int
) -> Float[Array, "b h2 w2 d"]:
    """The convolution of a plain map, with groups inside where its input or its output is narrow."""

    def convolve_in(groups: _Groups, x: Array, kernel: Array) -> Array:
        out = lax.conv_general_dilated(
            group(x, groups.sources),
            groups.spread(kernel),
            groups.strides,
            groups.padding,
            dimension_numbers=_DIMENSIONS,
        )
        return ungroup(out, groups.targets)

    return _with_groups(convolve_in, x, kernel, kernel.shape, stride, padding)


def convolve_gradient(
    x: Float[Array, "b h w c"], dy: Float[Array, "b h2 w2 d"], shape: tuple[int, ...], stride: int, padding: int
) -> Float[Array, "kh kw c d"]:
    """The gradient of `convolve` by its kernel of that `shape`, summed in at least float32."""
    accumulator = functional.wide_type(x.dtype)

    def gradient_in(groups: _Groups, x: Array, dy: Array) -> Array:
        x, dy = group(x, groups.sources), group(dy, groups.targets)
        size = jax.eval_shape(groups.spread, jax.ShapeDtypeStruct(shape, accumulator)).shape[:2]
        # The window of the kernel's first number covers what it is multiplied with, and so on: as many windows along
        # an axis as the kernel has numbers there.
        after = [
            (count - 1) * step + side - length - before
            for count, step, side, length, (before, _) in zip(
                dy.shape[1:3], groups.strides, size, x.shape[1:3], groups.padding
            )
        ]
        dwide = lax.conv_general_dilated(
            x,
            dy,
            (1, 1),
            [(before, end) for (before, _), end in zip(groups.padding, after)],
            rhs_dilation=groups.strides,
            dimension_numbers=("CHWN", "IHWO", "HWNC"),
            preferred_element_type=accumulator,
        )
        return groups.collect(dwide, shape[1])

    return _with_groups(gradient_in, x, dy, shape, stride, padding)


@dataclasses.dataclass(frozen=True)
class _Groups:
    """A convolution of groups of `sources` pixels to groups of `targets`.

    Attributes:
        sources: pixels in a group of the input.
        targets: pixels in a group of the output.
        befores: where the window of each target starts in the groups that all of them touch.
        count: how many groups these are.
        strides: of the convolution of groups.
        padding: of the convolution of groups.
    """

    sources: int
    targets: int
    befores: tuple[int, ...]
    count: int
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]

    def spread(self, kernel: Float[Array, "kh kw c d"]) -> Float[Array, "kh groups c2 d2"]:
        """The kernel for groups, with zeros where a pixel of a group lies outside a window."""
        height, width, channels, _ = kernel.shape
        ends = (self.count * self.sources - before - width for before in self.befores)
        shifted = [jnp.pad(kernel, ((0, 0), (before, end), (0, 0), (0, 0))) for before, end in zip(self.befores, ends)]
        return jnp.concatenate(shifted, axis=-1).reshape(height, self.count, self.sources * channels, -1)

    def collect(self, dwide: Float[Array, "kh groups c2 d2"], width: int) -> Float[Array, "kh kw c d"]:
        """The gradient of `spread` by a kernel of that width."""
        height, _, channels, features = dwide.shape
        by_target = dwide.reshape(
            height, self.count * self.sources, channels // self.sources, self.targets, features // self.targets
        )
        windows = (by_target[:, before : before + width, :, n] for n, before in enumerate(self.befores))
        return reduce(jnp.add, windows)


def _with_groups(
    function: Callable[[_Groups, Array, Array], Array],
    x: Float[Array, "b h w c"],
    other: Array,
    shape: tuple[int, ...],
    stride: int,
    padding: int,
) -> Array:
    """`function(groups, x, other)` with the groups of this platform, for a convolution by a kernel of that `shape`."""
    (_, _, width, channels), (_, kernel_width, _, features) = x.shape, shape
    out_width = (width + 2 * padding - kernel_width) // stride + 1
    single = _Groups(1, 1, (0,), kernel_width, (stride, stride), ((padding, padding),) * 2)
    sources, targets = group_size(width, channels, x.dtype), group_size(out_width, features, x.dtype)
    if sources == targets == 1 or targets * stride % sources:
        return function(single, x, other)
    left = -(-padding // sources)
    start = left * sources - padding  # where the first target's window starts
    befores = tuple(range(start, start + stride * targets, stride))
    count = -(-(befores[-1] + kernel_width) // sources)
    step = targets * stride // sources
    right = (out_width // targets - 1) * step + count - left - width // sources
    grouped = _Groups(sources, targets, befores, count, (stride, step), ((padding, padding), (left, right)))
    result: Array = lax.platform_dependent(x, other, tpu=partial(function, grouped), default=partial(function, single))
    return result

"""Feature maps with fewer channels than a TPU has lanes, laid out so that they fill the lanes.

A TPU spreads the last axis over 128 lanes. The first stage of s12, s24 and s36 has 64 channels: half of every register,
transfer and matrix unit would hold padding. So neighbouring pixels of a row form a group that shares the lanes. A map
[b, h, w, c] becomes [b, h, w / n, n * c], a reshape that moves nothing in row-major order. Norms and residuals stay the
same, a dense layer becomes a block-diagonal one, and a convolution becomes one with another kernel, which is zero where
a pixel of the group lies outside the window. The zeros cost nothing, because they take the place of padding.

The argument `pixels` is n, the number of pixels in a group. Functions without it take and return plain maps. XLA
removes the reshapes between one function's end and the next one's start, so a map stays grouped from stem to
downsampling.
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
    """The number of pixels of a row that fill the lanes; 1 if none do, and in float32, whose sums a TPU would round."""
    pixels, rest = divmod(LANES, channels)
    return pixels if jnp.dtype(dtype).itemsize < 4 and rest == 0 and width % pixels == 0 else 1


def group_pixels(x: Float[Array, "b h w c"], pixels: int) -> Float[Array, "b h w2 c2"]:
    """[b, h, w, c] as [b, h, w / n, n * c]."""
    b, h, w, c = x.shape
    return x.reshape(b, h, w // pixels, pixels, c).reshape(b, h, w // pixels, pixels * c)


def ungroup_pixels(x: Float[Array, "b h w2 c2"], pixels: int) -> Float[Array, "b h w c"]:
    """The inverse of `group_pixels`."""
    b, h, w, c = x.shape
    return x.reshape(b, h, w, pixels, c // pixels).reshape(b, h, w * pixels, c // pixels)


def dense(pixels: int, x: Float[Array, "b h w2 c2"], kernel: Float[Array, "c d"]) -> Float[Array, "b h w2 d2"]:
    """`x @ kernel` for each pixel of a group, for grouped maps."""
    if pixels == 1:
        return x @ kernel
    # The TPU compiler lays out a convolution with batch and channels in the tiles, and fuses the operations around it.
    # It lays out a matrix product with three batch axes with rows and channels in the tiles, and copies whole maps.
    blocks = jnp.kron(jnp.eye(pixels, dtype=kernel.dtype), kernel)
    return lax.conv_general_dilated(x, blocks[None, None], (1, 1), "VALID", dimension_numbers=_DIMENSIONS)


def dense_gradient(pixels: int, x: Float[Array, "b h w2 c2"], dy: Float[Array, "b h w2 d2"]) -> Float[Array, "c d"]:
    """The gradient of `dense` by its kernel: `x.T @ dy` over all positions, summed in at least float32."""
    accumulator = functional.wide_type(x.dtype)
    blocks = lax.platform_dependent(
        x,
        dy,
        cpu=partial(cpu_batching.dense_kernel_gradient, dtype=accumulator),
        default=lambda x, dy: lax.dot_general(
            x, dy, (((0, 1, 2), (0, 1, 2)), ((), ())), preferred_element_type=accumulator
        ),
    )
    c, d = blocks.shape
    return jnp.einsum("icid->cd", blocks.reshape(pixels, c // pixels, pixels, d // pixels))


def tile_channels(vector: Float[Array, " c"], pixels: int) -> Float[Array, " c2"]:
    """Repeats a vector over channels for each pixel of a group."""
    return jnp.tile(vector, pixels)


def sum_pixels(vectors: Float[Array, "*b c2"], pixels: int) -> Float[Array, "*b c"]:
    """The sum over the pixels of a group: the transpose of `tile_channels`."""
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
    # Relative to a whole window: away from the image's border the factor is 1, which rounds nothing.
    whole = pool_size**2
    weighted = (wide * (whole / _window_counts(pixels, dy, pool_size))).astype(dy.dtype)
    return (_window_sum(pixels, weighted, pool_size) / whole - wide).astype(dy.dtype)


def _window_sum(pixels: int, x: Float[Array, "b h w2 c2"], pool_size: int) -> Float[Array, "b h w2 c2"]:
    """The sum over each pixel's window, as a convolution with zeros and ones, summed in float32."""
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
    """The convolution of a plain map; on a TPU grouped inside if its input or output is narrow."""

    def convolve_in(convolution: _GroupedConvolution, x: Array, kernel: Array) -> Array:
        out = lax.conv_general_dilated(
            group_pixels(x, convolution.inputs),
            convolution.group_kernel(kernel),
            convolution.strides,
            convolution.padding,
            dimension_numbers=_DIMENSIONS,
        )
        return ungroup_pixels(out, convolution.outputs)

    return _for_platform(convolve_in, x, kernel, kernel.shape, stride, padding)


def convolve_gradient(
    x: Float[Array, "b h w c"], dy: Float[Array, "b h2 w2 d"], shape: tuple[int, ...], stride: int, padding: int
) -> Float[Array, "kh kw c d"]:
    """The gradient of `convolve` by its kernel of that `shape`, summed in at least float32."""
    accumulator = functional.wide_type(x.dtype)

    def gradient_in(convolution: _GroupedConvolution, x: Array, dy: Array) -> Array:
        x, dy = group_pixels(x, convolution.inputs), group_pixels(dy, convolution.outputs)
        size = jax.eval_shape(convolution.group_kernel, jax.ShapeDtypeStruct(shape, accumulator)).shape[:2]
        # The gradient of each number of the kernel is one window of this convolution. The padding at the end makes the
        # number of windows along an axis the kernel's size.
        after = [
            (count - 1) * step + side - length - before
            for count, step, side, length, (before, _) in zip(
                dy.shape[1:3], convolution.strides, size, x.shape[1:3], convolution.padding
            )
        ]
        dgrouped = lax.conv_general_dilated(
            x,
            dy,
            (1, 1),
            [(before, end) for (before, _), end in zip(convolution.padding, after)],
            rhs_dilation=convolution.strides,
            dimension_numbers=("CHWN", "IHWO", "HWNC"),
            preferred_element_type=accumulator,
        )
        return convolution.group_kernel_transpose(dgrouped, shape[1])

    return _for_platform(gradient_in, x, dy, shape, stride, padding)


@dataclasses.dataclass(frozen=True)
class _GroupedConvolution:
    """A convolution from groups of `inputs` pixels to groups of `outputs` pixels.

    Attributes:
        inputs: pixels in a group of the input.
        outputs: pixels in a group of the output.
        starts: for each output pixel of a group, the first input pixel of its window, counted from the first input
            group that the output group needs.
        width: the number of input groups that an output group needs, the width of the grouped kernel.
        strides: of the convolution of groups.
        padding: of the convolution of groups.
    """

    inputs: int
    outputs: int
    starts: tuple[int, ...]
    width: int
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]

    def group_kernel(self, kernel: Float[Array, "kh kw c d"]) -> Float[Array, "kh groups c2 d2"]:
        """The kernel between groups: zero where an input pixel lies outside an output pixel's window."""
        height, width, channels, _ = kernel.shape
        ends = (self.width * self.inputs - start - width for start in self.starts)
        shifted = [jnp.pad(kernel, ((0, 0), (start, end), (0, 0), (0, 0))) for start, end in zip(self.starts, ends)]
        return jnp.concatenate(shifted, axis=-1).reshape(height, self.width, self.inputs * channels, -1)

    def group_kernel_transpose(self, dkernel: Float[Array, "kh groups c2 d2"], width: int) -> Float[Array, "kh kw c d"]:
        """The gradient of a kernel with that `width`, from the gradient of `group_kernel`'s result."""
        height, _, channels, features = dkernel.shape
        by_output = dkernel.reshape(
            height, self.width * self.inputs, channels // self.inputs, self.outputs, features // self.outputs
        )
        windows = (by_output[:, start : start + width, :, n] for n, start in enumerate(self.starts))
        return reduce(jnp.add, windows)


def _for_platform(
    function: Callable[[_GroupedConvolution, Array, Array], Array],
    x: Float[Array, "b h w c"],
    other: Array,
    shape: tuple[int, ...],
    stride: int,
    padding: int,
) -> Array:
    """`function(convolution, x, other)`, grouped on a TPU and plain elsewhere.

    Args:
        function: computes the convolution, or a gradient of it.
        x: the convolution's input.
        other: the convolution's kernel, or the gradient of its output.
        shape: the kernel's.
        stride: pixels from one window to the next.
        padding: zeros around the map, on every side.
    """
    (_, _, width, channels), (_, kernel_width, _, features) = x.shape, shape
    out_width = (width + 2 * padding - kernel_width) // stride + 1
    plain = _GroupedConvolution(1, 1, (0,), kernel_width, (stride, stride), ((padding, padding),) * 2)
    inputs, outputs = group_size(width, channels, x.dtype), group_size(out_width, features, x.dtype)
    if inputs == outputs == 1 or outputs * stride % inputs:
        return function(plain, x, other)
    left = -(-padding // inputs)
    start = left * inputs - padding  # of the first output pixel's window
    starts = tuple(range(start, start + stride * outputs, stride))
    groups = -(-(starts[-1] + kernel_width) // inputs)
    step = outputs * stride // inputs
    right = (out_width // outputs - 1) * step + groups - left - width // inputs
    grouped = _GroupedConvolution(inputs, outputs, starts, groups, (stride, step), ((padding, padding), (left, right)))
    result: Array = lax.platform_dependent(x, other, tpu=partial(function, grouped), default=partial(function, plain))
    return result

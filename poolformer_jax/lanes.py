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

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from poolformer_jax import caches, functional

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
    accumulator = jnp.promote_types(x.dtype, jnp.float32)
    blocks = lax.platform_dependent(
        x,
        dy,
        cpu=partial(caches.kernel_gradient, dtype=accumulator),
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
    return vectors.reshape(*vectors.shape[:-1], pixels, -1).sum(-2)


def pooling_mixer(pixels: int, x: Float[Array, "b h w2 c2"], pool_size: int) -> Float[Array, "b h w2 c2"]:
    """`functional.pooling_mixer` of a grouped map, in at least float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if pixels == 1:
        return functional.pooling_mixer(wide, pool_size)
    return _window_sum(pixels, x, pool_size) / _window_counts(pixels, x, pool_size) - wide


def pooling_mixer_transpose(pixels: int, dy: Float[Array, "b h w2 c2"], pool_size: int) -> Float[Array, "b h w2 c2"]:
    """`functional.pooling_mixer_transpose` of a grouped map, rounded once."""
    wide = dy.astype(jnp.promote_types(dy.dtype, jnp.float32))
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
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw c d"],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **unused: Any,
) -> Float[Array, "b h2 w2 d"]:
    """The convolution of a plain map, with groups inside where its input or its output is narrow.

    `flax.linen.Conv` takes it in place of `lax.conv_general_dilated`, whose other arguments have one value here.
    """
    out_width = (x.shape[2] + sum(padding[1]) - kernel.shape[1]) // strides[1] + 1
    sources = group_size(x.shape[2], x.shape[3], x.dtype)
    targets = group_size(out_width, kernel.shape[3], x.dtype)
    plain = partial(lax.conv_general_dilated, window_strides=strides, padding=padding, dimension_numbers=_DIMENSIONS)
    if sources == targets == 1 or targets * strides[1] % sources:
        return plain(x, kernel)
    grouped = partial(_convolve_groups, sources, targets, strides, padding, out_width)
    result: Float[Array, "b h2 w2 d"] = lax.platform_dependent(x, kernel, tpu=grouped, default=plain)
    return result


def _convolve_groups(
    sources: int,
    targets: int,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    out_width: int,
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw c d"],
) -> Float[Array, "b h2 w2 d"]:
    """One group of `targets` pixels for every step over groups of `sources` pixels."""
    (stride, (left, _)), x = (strides[1], padding[1]), group(x, sources)
    groups_left = -(-left // sources)
    start = groups_left * sources - left  # where the first target's window starts in the groups it touches
    reach = start + stride * (targets - 1) + kernel.shape[1]
    groups = -(-reach // sources)
    shifted = [
        jnp.pad(kernel, ((0, 0), (before, groups * sources - before - kernel.shape[1]), (0, 0), (0, 0)))
        for before in range(start, start + stride * targets, stride)
    ]
    # [kh, groups, sources * c, targets * d]
    wide = jnp.concatenate(shifted, axis=-1).reshape(kernel.shape[0], groups, x.shape[3], -1)
    step = targets * stride // sources
    groups_right = (out_width // targets - 1) * step + groups - groups_left - x.shape[2]
    out = lax.conv_general_dilated(
        x, wide, (strides[0], step), (padding[0], (groups_left, groups_right)), dimension_numbers=_DIMENSIONS
    )
    return ungroup(out, targets)

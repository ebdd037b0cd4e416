"""Random changes on the device, inside the training step: mixup, cutmix, normalisation, random erasing.

Images are transferred with 8 bits per value. The order is the authors' (timm's FastCollateMixup, then its loader): mix
8-bit values and round, normalise, erase with noise.

Papers: mixup, arXiv 1710.09412; CutMix, arXiv 1905.04899; Random Erasing, arXiv 1708.04896; label smoothing, arXiv
1512.00567. Semantics: timm/data/mixup.py in mode "batch" and timm/data/random_erasing.py in mode "pixel".

All functions are pure and work under `jax.jit`. The result is the same on any number of devices, and devices with an
even number of images do not communicate: an image is mixed with its neighbour in the batch, whose order is random;
timm mixes the first image with the last.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt8
from scipy.special import betaincinv

from poolformer_jax.errors import InputError
from train.data.config import DataConfig, DeviceAugmentation

_ATTEMPTS = 10  # to find a rectangle that fits
_TABLE = 4097  # points of a distribution function


def augment_batch(
    key: Key[Array, ""],
    images: UInt8[Array, "b h w c"],
    labels: Int[Array, " b"] | Float[Array, "b k"],
    config: DataConfig,
    *,
    num_classes: int,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b k"]]:
    """The network's input and the targets of a training step.

    `labels` are from 0 to num_classes - 1, or the targets. The arithmetic is float32, whatever `dtype` is.

    Returns:
        Normalised pixels of `dtype`, and for every image its targets, float32: a distribution over the classes,
        the probability of each class, or for regression numbers. Mixed images have mixed targets.

    Raises:
        ValueError: when traced, if the batch size is not a multiple of the group size.
    """
    mix_key, erase_key = jax.random.split(key)
    targets = make_targets(labels, num_classes, config)
    values = images.astype(jnp.float32)
    if config.mix.mixes and len(labels) > 1:  # a single image has no other to be mixed with
        values, targets = mix_groups(mix_key, images, targets, config.mix)
    pixels = _normalize(values, config)
    if config.mix.erase_probability > 0:
        pixels = erase_rectangles(erase_key, pixels, config.mix)
    return pixels.astype(dtype), targets


def normalize_batch(
    images: UInt8[Array, "b h w c"], config: DataConfig, dtype: DTypeLike = jnp.float32
) -> Float[Array, "b h w c"]:
    """The network's input for evaluation: equals the image processor's `normalize` up to float32 rounding."""
    return _normalize(images.astype(jnp.float32), config).astype(dtype)


def make_targets(
    labels: Int[Array, " b"] | Float[Array, "b k"], num_classes: int, config: DataConfig
) -> Float[Array, "b k"]:
    """The targets before mixing, smoothed: those of several classes as y * (1 - smoothing) + smoothing / 2."""
    smoothing = config.mix.label_smoothing
    if config.problem_type == "single_label_classification":
        return smooth_one_hot(labels, num_classes, smoothing)
    if config.problem_type == "multi_label_classification":
        return labels * (1 - smoothing) + smoothing / 2
    return labels


def smooth_one_hot(labels: Int[Array, " b"], num_classes: int, smoothing: float) -> Float[Array, "b k"]:
    """Targets 1 - smoothing on the label, plus smoothing / k on every class."""
    return jax.nn.one_hot(labels, num_classes, dtype=jnp.float32) * (1 - smoothing) + smoothing / num_classes


def mix_groups(
    key: Key[Array, ""],
    images: UInt8[Array, "b h w c"],
    targets: Float[Array, "b k"],
    augment: DeviceAugmentation,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b k"]]:
    """Mixes images 0 and 1 of the batch with each other, 2 and 3, and so on, by mixup or cutmix.

    Returns:
        Mixed pixels, from 0 to 255 and rounded to whole numbers, and the targets mixed in the same proportion.
    """
    batch, height, width, _ = images.shape
    size = group_size(batch, augment)
    mixing = _draw_mixing(key, batch // size, height, width, augment)
    share = jnp.repeat(mixing.share, size, axis=0)[..., None]
    ratio = jnp.repeat(mixing.ratio, size)[:, None]
    # Swapped before the cast: the TPU compiler estimates a fifth of the cycles for bytes.
    own, other = images.astype(jnp.float32), _swap_neighbours(images).astype(jnp.float32)
    mixed = jnp.round(own * share + other * (1 - share))
    return mixed, targets * ratio + _swap_neighbours(targets) * (1 - ratio)


def _swap_neighbours(rows: Shaped[Array, "b ..."]) -> Shaped[Array, "b ..."]:
    pairs = rows.reshape(len(rows) // 2, 2, *rows.shape[1:])
    return pairs[:, ::-1].reshape(rows.shape)


def group_size(batch: int, augment: DeviceAugmentation) -> int:
    """The number of images that share a mixing ratio.

    Raises ValueError if it is odd, or does not divide the batch size.
    """
    size = min(augment.mix_group or batch, batch)
    if batch % size or size % 2:
        raise InputError(
            f"Mixup and cutmix need groups with an even number of images that divides the batch size. Got groups of "
            f"{size} in a batch of {batch}. Choose another batch size, or an even divisor with --data.mix.mix-group."
        )
    return size


class _Mixing(NamedTuple):
    share: Float[Array, "g h w"]
    """How much of each pixel is kept."""
    ratio: Float[Array, " g"]
    """How much of the image is kept."""


def _draw_mixing(key: Key[Array, ""], groups: int, height: int, width: int, augment: DeviceAugmentation) -> _Mixing:
    mix_key, switch_key, mixup_key, cutmix_key, box_key = jax.random.split(key, 5)
    shape = (groups,)
    # A group that is not mixed has ratio 1, which changes nothing in either method.
    mixes = jax.random.uniform(mix_key, shape) < augment.mix_probability
    uses_cutmix = _choose_cutmix(switch_key, shape, augment)
    mixup_ratio = _draw_ratio(mixup_key, shape, augment.mixup, mixes & ~uses_cutmix)
    cutmix_ratio = _draw_ratio(cutmix_key, shape, augment.cutmix, mixes & uses_cutmix)
    inside = _draw_box(box_key, cutmix_ratio, height, width)
    # The part of the box outside the image does not count as mixed.
    outside_share = 1 - inside.mean((1, 2), dtype=jnp.float32)
    return _Mixing(
        share=jnp.where(uses_cutmix[:, None, None], ~inside, mixup_ratio[:, None, None]).astype(jnp.float32),
        ratio=jnp.where(uses_cutmix, outside_share, mixup_ratio),
    )


def _choose_cutmix(key: Key[Array, ""], shape: tuple[int], augment: DeviceAugmentation) -> Bool[Array, " g"]:
    if augment.mixup == 0 or augment.cutmix == 0:
        return jnp.full(shape, augment.cutmix > 0)
    return jax.random.uniform(key, shape) < augment.switch_to_cutmix


def _draw_ratio(key: Key[Array, ""], shape: tuple[int], alpha: float, where: Bool[Array, " g"]) -> Float[Array, " g"]:
    """From Beta(alpha, alpha) where `where`, else 1.

    Uses a table of the inverse distribution function. `jax.random.beta` draws in a loop with rejection, which over
    sharded values communicates in every iteration.
    """
    if alpha == 0:
        return jnp.ones(shape)
    probability = np.linspace(0, 1, _TABLE)
    quantiles = jnp.asarray(betaincinv(alpha, alpha, probability), jnp.float32)
    drawn = jnp.interp(jax.random.uniform(key, shape), jnp.asarray(probability, jnp.float32), quantiles)
    return jnp.where(where, drawn, 1.0)


def _draw_box(key: Key[Array, ""], ratio: Float[Array, " g"], height: int, width: int) -> Bool[Array, "g h w"]:
    """Boxes with the images' aspect ratio and 1 - ratio of their area, centred on any pixel, clipped to the image."""
    edge = jnp.sqrt(1 - ratio)

    def draw_span(key: Key[Array, ""], length: int) -> Bool[Array, "g n"]:
        half = jnp.floor(length * edge).astype(jnp.int32) // 2
        middle = jax.random.randint(key, ratio.shape, 0, length)
        return _span(middle - half, 2 * half, length)

    y_key, x_key = jax.random.split(key)
    return draw_span(y_key, height)[:, :, None] & draw_span(x_key, width)[:, None, :]


def _span(start: Int[Array, " b"], count: Int[Array, " b"], length: int) -> Bool[Array, "b n"]:
    """True for positions in [start, start + count)."""
    position = jnp.arange(length)
    return (position >= start[:, None]) & (position < (start + count)[:, None])


def erase_rectangles(
    key: Key[Array, ""], pixels: Float[Array, "b h w c"], augment: DeviceAugmentation
) -> Float[Array, "b h w c"]:
    """Replaces a random rectangle of some images with normal noise for every pixel.

    The pixels are normalised, with mean 0 and variance 1 like the noise.
    """
    box_key, noise_key = jax.random.split(key)
    batch, height, width, _ = pixels.shape
    inside = _draw_rectangles(box_key, batch, height, width, augment)
    noise = jax.random.normal(noise_key, pixels.shape, pixels.dtype)
    return jnp.where(inside[..., None], noise, pixels)


def _draw_rectangles(
    key: Key[Array, ""], batch: int, height: int, width: int, augment: DeviceAugmentation
) -> Bool[Array, "b h w"]:
    """The first of ten rectangles that is smaller than the image; empty if none is, or if the image is not erased."""
    happens_key, area_key, ratio_key, top_key, left_key = jax.random.split(key, 5)
    shape = (batch, _ATTEMPTS)
    smallest, largest = augment.erase_area
    area = jax.random.uniform(area_key, shape, minval=smallest, maxval=largest) * (height * width)
    low, high = jnp.log(jnp.asarray(augment.erase_ratio))
    ratio = jnp.exp(jax.random.uniform(ratio_key, shape, minval=low, maxval=high))
    box_height = jnp.round(jnp.sqrt(area * ratio)).astype(jnp.int32)
    box_width = jnp.round(jnp.sqrt(area / ratio)).astype(jnp.int32)
    fits = (box_height < height) & (box_width < width)
    first = jnp.argmax(fits, axis=1)[:, None]
    box_height = jnp.take_along_axis(box_height, first, axis=1)[:, 0]
    box_width = jnp.take_along_axis(box_width, first, axis=1)[:, 0]
    happens = (jax.random.uniform(happens_key, (batch,)) < augment.erase_probability) & fits.any(axis=1)
    top = jax.random.randint(top_key, (batch,), 0, jnp.maximum(height - box_height, 0) + 1)
    left = jax.random.randint(left_key, (batch,), 0, jnp.maximum(width - box_width, 0) + 1)
    rows, columns = _span(top, box_height, height), _span(left, box_width, width)
    return happens[:, None, None] & rows[:, :, None] & columns[:, None, :]


def _normalize(values: Float[Array, "b h w c"], config: DataConfig) -> Float[Array, "b h w c"]:
    mean, std = jnp.asarray(config.image_mean, jnp.float32), jnp.asarray(config.image_std, jnp.float32)
    return (values * jnp.float32(1 / 255) - mean) / std

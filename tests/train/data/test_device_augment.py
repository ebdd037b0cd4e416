"""Augmentation on the device: timm's mixup, cutmix and erasing, and inference's normalisation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.data import DIGITS, DataConfig, DeviceAugmentation
from train.data.augment.device import augment_batch, erase_rectangles, mix_groups, normalize_batch, smooth_one_hot

CONFIG = DataConfig(image_size=24, batch_size=64)
IMAGES = np.random.default_rng(0).integers(0, 256, (64, 24, 24, 3), dtype=np.uint8)
LABELS = np.arange(64) % 10
TARGETS = np.asarray(smooth_one_hot(jnp.asarray(LABELS), 10, 0.1))


@functools.partial(jax.jit, static_argnums=1)
def mixed_by(key, augment):
    return mix_groups(key, jnp.asarray(IMAGES), jnp.asarray(TARGETS), augment)


def mix(seed, **changes):
    mixed, targets = mixed_by(jax.random.key(seed), dataclasses.replace(DeviceAugmentation(mix_group=8), **changes))
    return np.asarray(mixed).reshape(8, 8, 24, 24, 3), np.asarray(targets).reshape(8, 8, 10)


GROUPS = IMAGES.reshape(8, 8, 24, 24, 3).astype(np.float32)
GROUP_TARGETS = TARGETS.reshape(8, 8, 10)
NEIGHBOURS = [1, 0, 3, 2, 5, 4, 7, 6]


def ratios_of(targets):
    """Each group's ratio, worked out from its first image's target: labels differ within every pair."""
    own, other = GROUP_TARGETS[:, 0], GROUP_TARGETS[:, NEIGHBOURS][:, 0]
    return ((targets[:, 0] - other) * (own - other)).sum(-1) / ((own - other) ** 2).sum(-1)


def test_mixup_is_the_rounded_weighted_sum_with_the_neighbour_in_the_batch():
    mixed, targets = mix(0, cutmix=0.0)
    ratio = ratios_of(targets)
    assert len(np.unique(ratio.round(4))) == 8  # one for each group
    weight = ratio[:, None, None, None, None]
    exact = GROUPS * weight + GROUPS[:, NEIGHBOURS] * (1 - weight)
    assert np.abs(mixed - exact).max() <= 0.5 + 1e-3  # rounded, up to float32's error in the ratio
    np.testing.assert_array_equal(mixed, np.round(mixed))
    expected = GROUP_TARGETS * ratio[:, None, None] + GROUP_TARGETS[:, NEIGHBOURS] * (1 - ratio[:, None, None])
    np.testing.assert_allclose(targets, expected, atol=1e-6)


def test_cutmix_pastes_one_box_of_the_neighbour_and_weighs_the_targets_by_its_area():
    mixed, targets = mix(1, mixup=0.0)
    for group in range(8):
        own, other = GROUPS[group], GROUPS[group, NEIGHBOURS]
        foreign = (mixed[group] != own).any(axis=(0, 3))
        rows, columns = np.flatnonzero(foreign.any(1)), np.flatnonzero(foreign.any(0))
        box = np.zeros((24, 24), bool)
        if rows.size:
            box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        np.testing.assert_array_equal(mixed[group], np.where(box[..., None], other, own))
        np.testing.assert_allclose(ratios_of(targets)[group], 1 - box.mean(), atol=1e-5)


def test_cutmix_boxes_are_timms_for_the_same_ratio_and_centre():
    """timm: edges int(length * sqrt(1 - ratio)), halved downwards on both sides of a centre, cut off at the border."""
    from train.data.augment import device

    key = jax.random.key(3)
    ratio = jnp.linspace(0.0, 1.0, 50)
    boxes = np.asarray(device._draw_box(key, ratio, 24, 40))
    y_key, x_key = jax.random.split(key)
    centre_y = np.asarray(jax.random.randint(y_key, (50,), 0, 24))
    centre_x = np.asarray(jax.random.randint(x_key, (50,), 0, 40))
    for box, lam, y, x in zip(boxes, np.asarray(ratio, np.float32), centre_y, centre_x):
        cut_h, cut_w = int(24 * np.sqrt(1 - lam)), int(40 * np.sqrt(1 - lam))
        expected = np.zeros((24, 40), bool)
        expected[max(y - cut_h // 2, 0) : min(y + cut_h // 2, 24), max(x - cut_w // 2, 0) : min(x + cut_w // 2, 40)] = (
            True
        )
        np.testing.assert_array_equal(box, expected)


def test_about_half_of_the_groups_use_cutmix():
    whole = 0
    for seed in range(40):
        mixed, targets = mix(seed)
        ratio = ratios_of(targets)[:, None, None, None, None]
        blended = np.abs(mixed - (GROUPS * ratio + GROUPS[:, NEIGHBOURS] * (1 - ratio))).max(axis=(1, 2, 3, 4)) < 0.51
        whole += int((~blended).sum())
    assert 160 - 5 * 9 < whole < 160 + 5 * 9  # of 320; the standard deviation is 9


def test_mixing_ratios_follow_the_beta_distribution():
    ratios = np.concatenate([ratios_of(mix(seed, cutmix=0.0)[1]) for seed in range(300)])
    assert scipy.stats.kstest(ratios, scipy.stats.beta(0.8, 0.8).cdf).pvalue > 1e-3
    assert scipy.stats.kstest(ratios, scipy.stats.beta(1.0, 1.0).cdf).pvalue < 1e-3  # the test distinguishes them


def test_without_mixing_nothing_changes():
    mixed, targets = mix(0, mix_probability=1e-9)
    np.testing.assert_array_equal(mixed, GROUPS)
    np.testing.assert_allclose(targets, GROUP_TARGETS, atol=1e-7)


@pytest.mark.parametrize(("batch", "group"), [(64, 48), (9, 0), (24, 16)])
def test_batches_without_whole_groups_are_refused(batch, group):
    config = dataclasses.replace(CONFIG, mix=DeviceAugmentation(mix_group=group))
    with pytest.raises(
        ValueError, match=rf"Got groups of {min(group or batch, batch)} in a batch of {batch}.*--data.mix.mix-group"
    ):
        augment_batch(jax.random.key(0), IMAGES[:batch], LABELS[:batch], config, num_classes=10)


def test_smoothed_targets_are_timms():
    targets = smooth_one_hot(jnp.array([2]), 5, 0.1)
    np.testing.assert_allclose(targets[0], [0.02, 0.02, 0.92, 0.02, 0.02], atol=1e-7)


def test_erasing_replaces_one_rectangle_by_standard_normal_noise():
    pixels = jnp.full((400, 24, 24, 3), 100.0)
    erased = np.asarray(erase_rectangles(jax.random.key(0), pixels, DeviceAugmentation()))
    changed = (erased != 100).all(-1)
    np.testing.assert_array_equal(changed, (erased != 100).any(-1))  # every channel of a pixel
    hit = changed.any((1, 2))
    assert abs(hit.mean() - 0.25) < 5 * 0.0217  # the standard deviation of 400 draws
    noise = []
    for image, mask in zip(erased[hit], changed[hit]):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.all()
        # 2 % to a third of the image, up to the rounding of two edges
        assert 0.015 < box.size / 576 < 0.37
        assert 0.25 < box.shape[0] / box.shape[1] < 4.0
        noise.append(image[mask])
    values = np.concatenate(noise).ravel()
    assert abs(values.mean()) < 0.05
    assert abs(values.std() - 1) < 0.05


def test_normalisation_is_the_image_processors():
    processor = CONFIG.image_processor()
    expected = processor.normalize(IMAGES)
    np.testing.assert_allclose(normalize_batch(jnp.asarray(IMAGES), CONFIG), expected, rtol=2e-6, atol=2e-7)
    grey = dataclasses.replace(DIGITS, image_size=24)
    expected = grey.image_processor().normalize(IMAGES[..., :1])
    np.testing.assert_allclose(normalize_batch(jnp.asarray(IMAGES[..., :1]), grey), expected, rtol=2e-6, atol=2e-7)


def test_without_augmentation_the_input_is_that_of_evaluation():
    off = DeviceAugmentation(mixup=0, cutmix=0, erase_probability=0, label_smoothing=0)
    config = dataclasses.replace(CONFIG, mix=off)
    pixels, targets = augment_batch(jax.random.key(0), jnp.asarray(IMAGES), LABELS, config, num_classes=10)
    np.testing.assert_array_equal(pixels, normalize_batch(jnp.asarray(IMAGES), config))
    np.testing.assert_array_equal(targets, np.eye(10)[LABELS])


def test_the_key_decides_the_result_and_dtype_the_pixels_type():
    @jax.jit
    def run(seed):
        return augment_batch(
            jax.random.key(seed), jnp.asarray(IMAGES), LABELS, CONFIG, num_classes=10, dtype=jnp.bfloat16
        )

    pixels, targets = run(0)
    assert (pixels.dtype, targets.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(pixels, run(0)[0])
    assert (np.asarray(pixels) != np.asarray(run(1)[0])).any()
    np.testing.assert_allclose(targets.sum(-1), 1.0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("group", [8, 0])
def test_sharded_batches_give_the_same_and_need_no_communication(group):
    """Also if a group is spread over several devices, which have eight images each."""
    config = dataclasses.replace(CONFIG, mix=DeviceAugmentation(mix_group=group))

    def run(key, images, labels):
        return augment_batch(key, images, labels, config, num_classes=10)

    alone = jax.jit(run)(jax.random.key(5), IMAGES, LABELS)
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    arguments = (jax.random.key(5), jax.device_put(IMAGES, split), jax.device_put(LABELS, split))
    program = jax.jit(run, in_shardings=(whole, split, split), out_shardings=split).lower(*arguments).compile()
    text = program.as_text()
    for collective in ("all-to-all", "all-gather", "all-reduce", "collective-permute", "reduce-scatter"):
        assert f" {collective}(" not in text, collective
    for one, many in zip(alone, program(*arguments)):
        np.testing.assert_allclose(one, many, atol=1e-6)

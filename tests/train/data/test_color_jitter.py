"""Colour jitter has torchvision's pixels and distribution; vertical flips turn images over."""

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from paths import TESTS
from small_data import SMALL
from train.data import HostAugmentation, TrainingTransform
from train.data.augment.color_jitter import change_color, jitter_colors


@pytest.fixture(scope="module")
def picture():
    with Image.open(TESTS / "images" / "coffee.jpg") as image:
        return image.resize((40, 30))


@pytest.mark.parametrize("factor", [-0.5, -0.1, 0.003, 0.3, 0.5])
def test_hue_is_turned_as_in_torchvision(picture, factor):
    """Its formula, written out: bytes that wrap around, in HSV."""
    hue, saturation, value = picture.convert("HSV").split()
    with np.errstate(over="ignore"):
        turned = np.array(hue, dtype=np.uint8) + np.int32(factor * 255).astype(np.uint8)
    expected = Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")
    np.testing.assert_array_equal(change_color(picture, 3, factor), expected)
    np.testing.assert_array_equal(change_color(picture.convert("L"), 3, factor), picture.convert("L"))


def test_the_other_changes_are_those_of_pillow(picture):
    for kind, enhancer in enumerate((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)):
        np.testing.assert_array_equal(change_color(picture, kind, 0.7), enhancer(picture).enhance(0.7))


def test_factors_are_uniform_around_1_in_random_order(monkeypatch, picture):
    calls = []
    monkeypatch.setattr(
        "train.data.augment.color_jitter.change_color", lambda image, *change: calls.append(change) or image
    )
    rng = np.random.default_rng(0)
    for _ in range(400):
        jitter_colors(picture, (0.4, 0.0, 1.5, 0.1), rng)
    brightness, saturation, hue = ([factor for kind, factor in calls if kind == one] for one in (0, 2, 3))
    assert len(calls) == 3 * 400  # contrast has strength 0
    for factors, low, high in ((brightness, 0.6, 1.4), (saturation, 0.0, 2.5), (hue, -0.1, 0.1)):
        assert low <= min(factors) < max(factors) <= high
        assert np.mean(factors) == pytest.approx((low + high) / 2, abs=4 * (high - low) / np.sqrt(12 * 400))
    assert {kind for kind, _ in calls[::3]} == {0, 2, 3}


def test_the_transform_flips_and_jitters(picture):
    plain = HostAugmentation(crop="evaluation", randaugment="none", horizontal_flip=0.0)
    config = dataclasses.replace(SMALL, image_mean=(0.5,) * 3, image_std=(0.5,) * 3, augment=plain)

    def transformed(**changes):
        transform = TrainingTransform(dataclasses.replace(config, augment=dataclasses.replace(plain, **changes)))
        return transform(np.asarray(picture), np.random.default_rng(1))

    np.testing.assert_array_equal(transformed(vertical_flip=1.0), transformed()[::-1])
    assert not np.array_equal(transformed(color_jitter=(0.4, 0.4, 0.4, 0.1)), transformed())

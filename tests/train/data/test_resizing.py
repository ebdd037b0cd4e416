"""Resizing: both libraries compute Pillow's filters, and a missing one is named."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from jpegs import IMAGES, RESIZERS, needs_simd, photograph
from train.data import DataConfig, HostAugmentation, TrainingTransform, open_source, train_batches
from train.data.augment import resizing
from train.data.augment.crops import Box
from train.data.augment.resizing import choose_resizer, resize, to_pixels

FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


def weights(length, size, resample):
    """The filter as a matrix [size, length] in float64: the mean, weighted by the filter, of what a pixel covers."""
    scale = length / size
    stretch = max(1.0, scale)
    centre = (np.arange(size) + 0.5)[:, None] * scale
    x = np.abs((np.arange(length) + 0.5 - centre) / stretch)
    if resample == Image.Resampling.BILINEAR:
        matrix = np.clip(1 - x, 0, None)
    else:  # Keys's cubic with a = -1/2
        near, far = (1.5 * x - 2.5) * x**2 + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        matrix = np.where(x < 1, near, np.where(x < 2, far, 0))
    return matrix / matrix.sum(1, keepdims=True)


def exactly(image, size, resample):
    pixels = np.asarray(image, np.float64)
    across = np.einsum("yh,hwc->ywc", weights(image.height, size, resample), pixels)
    return np.clip(np.einsum("xw,ywc->yxc", weights(image.width, size, resample), across), 0, 255)


@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize("resizer", RESIZERS)
@pytest.mark.parametrize("box", [Box(31, 22, 267, 245), Box(0, 0, 600, 400), Box(100, 50, 160, 97)])
def test_either_resizer_computes_the_antialiased_filter(resizer, resample, box):
    """Rounded twice to 8 bits: errors of up to half a level each, a third of a level together if independent."""
    image = photograph()
    made = np.asarray(resize(to_pixels(image.crop(box)), 224, resample, resizer), np.float64)
    error = np.abs(made - exactly(image.crop(box), 224, resample))
    assert error.mean() < 1 / 3
    assert (error <= 1).mean() > 0.999


@needs_simd
@settings(max_examples=30, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    size=st.integers(1, 64),
    resample=st.sampled_from(FILTERS),
    mode=st.sampled_from(["RGB", "L"]),
    seed=st.integers(0, 99),
)
def test_crops_of_any_size_differ_by_rounding(width, height, size, resample, mode, seed):
    """Smooth images, so that bicubic is not clipped between its two steps.

    Each step rounds by up to half a level, and the absolute values of bicubic's weights sum to 1.25 at most. So both
    are within 1.125 levels of the exact filter, and at most 2 levels apart.
    """
    small = np.random.default_rng(seed).integers(60, 196, (2, 2, 3), dtype=np.uint8)
    picture = Image.fromarray(small).convert(mode).resize((100, 100), Image.Resampling.BICUBIC)
    pixels = to_pixels(picture.crop((5, 3, 5 + width, 3 + height)))
    slow, fast = (resize(pixels, size, resample, who).astype(np.int16) for who in ("pillow", "simd"))
    assert slow.shape == fast.shape
    assert np.abs(slow - fast).max() <= 2


@needs_simd
@pytest.mark.parametrize("resample", FILTERS)
def test_pixels_do_not_depend_on_the_processor(monkeypatch, resample):
    from cykooz_resizer import CpuExtensions

    pixels = to_pixels(photograph().crop((31, 22, 267, 245)))
    usual = resize(pixels, 224, resample, "simd")
    resizer = resizing._resizer(resample)[0]
    known = resizer.cpu_extensions
    try:
        resizer.cpu_extensions = CpuExtensions.none
        np.testing.assert_array_equal(resize(pixels, 224, resample, "simd"), usual)
    finally:
        resizer.cpu_extensions = known


@pytest.fixture
def without_the_package(monkeypatch):
    monkeypatch.setattr(resizing.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "cykooz_resizer", None)
    choose_resizer.cache_clear()
    yield
    choose_resizer.cache_clear()


def test_without_the_package_pillow_resizes(without_the_package):
    data = (IMAGES / "coffee.jpg").read_bytes()
    made = {}
    for resizer in ("auto", "pillow"):
        config = DataConfig(source="folder:/nowhere", augment=HostAugmentation(resizer=resizer))
        made[resizer] = TrainingTransform(config)(data, np.random.default_rng(0))
    np.testing.assert_array_equal(made["auto"], made["pillow"])


def test_a_resizer_that_is_missing_is_named_before_anything_starts(without_the_package):
    augment = HostAugmentation(resizer="simd")
    config = DataConfig(source="synthetic", synthetic_examples=20, image_size=8, batch_size=2, augment=augment)
    with pytest.raises(ValueError, match=r"pip install cykooz-resizer.*--data\.augment\.resizer pillow"):
        train_batches(config, open_source(config, "train"))

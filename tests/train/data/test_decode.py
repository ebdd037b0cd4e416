"""Decoding crops gives the pixels of decoding, cropping and resizing with Pillow, for every kind of file."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from jpegs import IMAGES, RESIZERS, encoded, photograph
from poolformer_jax.images import ImageError
from train.data.augment import decode
from train.data.augment.crops import Box, random_resized_box, shift_and_rotate
from train.data.augment.decode import decode_crop
from train.data.augment.resizing import to_pixels

BOX = Box(31, 22, 267, 245)
BICUBIC = Image.Resampling.BICUBIC


def decoded(data, box=BOX, size=224, **options):
    return decode_crop(data, lambda width, height: box, size, BICUBIC, **options)


@pytest.mark.parametrize("name", ["astronaut.jpg", "coffee.jpg", "camera_gray.png", "chelsea_rgba.png"])
def test_pixels_are_those_of_decoding_cropping_and_resizing_in_turn(name):
    data = (IMAGES / name).read_bytes()
    long_way = Image.open(io.BytesIO(data)).convert("RGB").crop(BOX).resize((224, 224), BICUBIC)
    np.testing.assert_array_equal(decoded(data), long_way)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_jpegs_of_every_colour_become_rgb_or_grey(mode):
    data = encoded(photograph().convert(mode))
    picture = Image.open(io.BytesIO(data))
    for channels, wanted in ((3, "RGB"), (1, "L")):
        result = decoded(data, num_channels=channels)
        assert result.shape == (224, 224, channels)
        expected = picture.convert(wanted).crop(BOX).resize((224, 224), BICUBIC)
        np.testing.assert_array_equal(result, to_pixels(expected))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_rotated_as_their_exif_says(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(photograph(), exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    sizes = []

    def choose(width, height):
        sizes.append((width, height))
        return BOX

    result = decode_crop(data, choose, 224, BICUBIC, scaled_decoding=True)
    assert sizes == [upright.size]
    np.testing.assert_array_equal(result, upright.crop(BOX).resize((224, 224), BICUBIC))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("resizer", RESIZERS)
@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, BICUBIC])
def test_pixels_outside_the_crop_have_no_effect(resample, resizer, kind):
    """A white frame just outside a black crop leaves it black."""
    image = Image.new("RGB", (96, 96), "white")
    image.paste("black", (16, 16, 80, 80))
    data = encoded(image, kind, subsampling=0, quality=100)
    assert not decode_crop(data, lambda width, height: Box(16, 16, 80, 80), 33, resample, resizer=resizer).any()


def large_photograph():
    return photograph(size=(1803, 1201))


def test_scaled_decoding_is_used_only_for_crops_at_least_four_times_too_large():
    data = encoded(large_photograph(), quality=95)
    for box, differs in ((Box(3, 5, 899, 901), True), (Box(3, 5, 898, 901), False), (Box(3, 5, 200, 190), False)):
        exact, fast = (decoded(data, box, scaled_decoding=scaled) for scaled in (False, True))
        assert (exact != fast).any() == differs, box


@pytest.mark.parametrize(("size", "scale"), [(224, 4), (112, 8)])
def test_scaled_decoding_shows_the_same_crop(size, scale):
    """A shift by one decoded pixel would differ several times as much."""
    data = encoded(large_photograph(), quality=95)
    box = Box(301, 117, 301 + 896, 117 + 896)
    exact = np.asarray(decoded(data, box, size), np.float64)
    fast = np.asarray(decoded(data, box, size, scaled_decoding=True), np.float64)
    moved = np.asarray(decoded(data, Box(301 + scale, 117, 1197 + scale, 1013), size), np.float64)
    error, error_of_a_pixel = np.abs(fast - exact).mean(), np.abs(moved - exact).mean()
    assert error < error_of_a_pixel / 4


@pytest.mark.parametrize("cut", [0, 3, 200, 20_000])
def test_truncated_files_are_refused(cut):
    data = (IMAGES / "coffee.jpg").read_bytes()[:cut]
    with pytest.raises(ImageError):
        decoded(data, Box(0, 0, 600, 400))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (1000, r"its file has more than 1000 pixels, .* If you trust it, raise PIL\.Image\.MAX_IMAGE_PIXELS"),
        (200_000, "600 x 400 pixels, has more than 200000 pixels"),
    ],
)
def test_enormous_images_are_refused_before_they_are_decoded(monkeypatch, limit, expected):
    """Pillow only warns up to twice its limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ImageError, match=expected):
        decoded((IMAGES / "coffee.jpg").read_bytes())


@pytest.mark.parametrize("name", ["coffee.jpg", "chelsea_rgba.png"])
def test_an_error_in_choosing_the_crop_is_not_a_bad_image(name):
    with pytest.raises(ZeroDivisionError):
        decode_crop((IMAGES / name).read_bytes(), lambda width, height: Box(0, 0, width // 0, height), 224, BICUBIC)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("where", ["open", "load"])
def test_a_lack_of_memory_is_not_a_bad_image(monkeypatch, where, scaled):
    """Otherwise training with on_bad_image="skip" would silently replace good images."""
    monkeypatch.setattr(decode, "decode_region", lambda *_: None)
    monkeypatch.setattr(*{"open": (Image, "open"), "load": (JpegImageFile, "load")}[where], no_memory)
    with pytest.raises(MemoryError):
        decoded((IMAGES / "coffee.jpg").read_bytes(), Box(0, 0, 600, 400), size=32, scaled_decoding=scaled)


def no_memory(*_, **__):
    raise MemoryError


def test_random_boxes_have_the_given_areas_and_aspect_ratios():
    rng = np.random.default_rng(0)
    boxes = [random_resized_box(500, 375, (0.08, 1.0), (3 / 4, 4 / 3), rng) for _ in range(3000)]
    for box in boxes:
        assert 0 <= box.left < box.right <= 500
        assert 0 <= box.top < box.bottom <= 375
    areas = np.array([box.width * box.height for box in boxes]) / (500 * 375)
    ratios = np.array([box.width / box.height for box in boxes])
    assert 0.078 < areas.min() < 0.1
    assert areas.max() > 0.95
    assert 0.74 < ratios.min() < 0.76
    assert 1.32 < ratios.max() < 1.35
    assert abs(np.median(np.log(ratios))) < 0.05
    lefts = np.array([box.left / max(1, 500 - box.width) for box in boxes])
    assert abs(lefts.mean() - 0.5) < 0.05


@pytest.mark.parametrize(("size", "expected"), [((900, 90), (120, 90)), ((90, 900), (90, 120)), ((1, 1), (1, 1))])
def test_images_too_long_for_any_box_give_a_central_crop(size, expected):
    box = random_resized_box(*size, (1.0, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0))
    assert (box.width, box.height) == expected
    assert abs(box.left + box.right - size[0]) <= 1
    assert abs(box.top + box.bottom - size[1]) <= 1


def test_shift_and_rotation_stay_within_their_bounds():
    dot = np.zeros((101, 101), np.uint8)
    dot[48:53, 78:83] = 255
    places = []
    for seed in range(200):
        moved = np.asarray(shift_and_rotate(Image.fromarray(dot), 0.05, 10, np.random.default_rng(seed)), np.float64)
        rows, columns = np.indices(moved.shape)
        places.append((np.average(rows, weights=moved) - 50, np.average(columns, weights=moved) - 50))
    y, x = np.array(places).T
    radius, reach = 30, 0.05 * 101
    assert np.abs(y).max() <= radius * np.sin(np.radians(10)) + reach + 0.6
    assert np.abs(x - radius).max() <= radius * (1 - np.cos(np.radians(10))) + reach + 0.6
    assert y.std() > 2
    assert x.std() > 2


def test_no_shift_and_no_rotation_change_nothing():
    image = photograph()
    assert shift_and_rotate(image, 0, 0, np.random.default_rng(0)) is image

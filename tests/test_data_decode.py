"""Decoding and cropping: the same pixels as Pillow's long way, from every kind of file; and where crops come from."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from poolformer_jax.image_reading import ImageError
from train.data import partial_jpeg
from train.data.crops import Box, random_resized_box, shift_and_rotate
from train.data.decode import decode_part
from train.data.partial_jpeg import decode_rows

IMAGES = Path(__file__).parent / "images"
BOX = Box(31, 22, 267, 245)
BICUBIC = Image.Resampling.BICUBIC


def photograph():
    with Image.open(IMAGES / "coffee.jpg") as image:
        return image.convert("RGB")


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(data, box=BOX, size=224, **options):
    return decode_part(data, lambda width, height: box, size, BICUBIC, **options)


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
        assert result.mode == wanted
        np.testing.assert_array_equal(result, picture.convert(wanted).crop(BOX).resize((224, 224), BICUBIC))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright_whatever_their_exif_says(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(photograph(), exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    sizes = []

    def choose(width, height):
        sizes.append((width, height))
        return BOX

    result = decode_part(data, choose, 224, BICUBIC, scaled_decoding=True)
    assert sizes == [upright.size]
    np.testing.assert_array_equal(result, upright.crop(BOX).resize((224, 224), BICUBIC))


def large_photograph():
    return photograph().resize((1203, 801), BICUBIC)


def test_scaled_decoding_is_used_only_where_the_part_is_at_least_halved():
    data = encoded(large_photograph(), quality=95)
    for box, differs in ((Box(3, 5, 451, 453), True), (Box(3, 5, 450, 453), False), (Box(3, 5, 200, 190), False)):
        exact, fast = (np.asarray(decoded(data, box, scaled_decoding=scaled)) for scaled in (False, True))
        assert (exact != fast).any() == differs, box


@pytest.mark.parametrize(("size", "scale"), [(224, 2), (112, 4), (56, 8)])
def test_scaled_decoding_shows_the_same_part(size, scale):
    """Off by one pixel of the decoded image it would differ several times as much; so would another scale's part."""
    data = encoded(large_photograph(), quality=95)
    box = Box(301, 117, 301 + 448, 117 + 448)
    exact = np.asarray(decoded(data, box, size), np.float64)
    fast = np.asarray(decoded(data, box, size, scaled_decoding=True), np.float64)
    moved = np.asarray(decoded(data, Box(301 + scale, 117, 749 + scale, 565), size), np.float64)
    error, error_of_a_pixel = np.abs(fast - exact).mean(), np.abs(moved - exact).mean()
    assert error < error_of_a_pixel / 4


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_decoding_stops_below_the_last_row_with_the_rows_of_a_full_decode(options, mode):
    data = encoded(photograph().convert(mode), **options)
    for rows in (1, 7, 200, 359, 361, 400):
        with Image.open(io.BytesIO(data)) as part, Image.open(io.BytesIO(data)) as whole:
            decode_rows(part, rows, len(data))
            np.testing.assert_array_equal(part.crop((0, 0, 600, rows)), whole.crop((0, 0, 600, rows)), str(rows))


def test_decoding_really_stops():
    """The rest of the file is missing, and nobody asks for it."""
    assert partial_jpeg.WORKS
    data = encoded(photograph())
    with Image.open(io.BytesIO(data[: len(data) * 3 // 4])) as part:
        decode_rows(part, 200, len(data))
        assert np.asarray(part.crop((0, 0, 600, 200))).any()


def test_black_rows_are_decoded_like_any_other():
    picture = photograph()
    picture.paste("black", (0, 100, 600, 400))
    picture.paste("white", (0, 130, 600, 135))
    data = encoded(picture, quality=100, subsampling=0)
    with Image.open(io.BytesIO(data)) as part, Image.open(io.BytesIO(data)) as whole:
        decode_rows(part, 200, len(data))
        np.testing.assert_array_equal(part.crop((0, 0, 600, 200)), whole.crop((0, 0, 600, 200)))


@pytest.mark.parametrize("size", [224, 112, 56])
def test_scaled_decoding_gives_the_same_whether_it_stops_early_or_not(monkeypatch, size):
    data = encoded(large_photograph(), quality=95)
    for top in (0, 5, 100):
        box = Box(301, top, 301 + 448, top + 448)
        early = decoded(data, box, size, scaled_decoding=True)
        with monkeypatch.context() as context:
            context.setattr(partial_jpeg, "WORKS", False)
            np.testing.assert_array_equal(early, decoded(data, box, size, scaled_decoding=True))


@pytest.mark.parametrize("cut", [0, 3, 200, 20_000])
def test_truncated_files_are_refused(cut):
    data = (IMAGES / "coffee.jpg").read_bytes()[:cut]
    with pytest.raises(ImageError):
        decoded(data, Box(0, 0, 600, 400))


def test_enormous_images_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="exceeds limit of 2000 pixels"):
        decoded((IMAGES / "coffee.jpg").read_bytes())


def test_random_boxes_have_the_areas_and_shapes_asked_for():
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
def test_images_too_long_for_any_box_give_their_middle(size, expected):
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

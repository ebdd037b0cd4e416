"""JPEGs with restart markers: a part is cut from the file before it is decoded, with the pixels of the whole."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from jpegs import IMAGES, KINDS, boxes, encoded, opened, photograph
from poolformer_jax.image_reading import ImageError
from train.data import prepare as preparing
from train.data.crops import Box
from train.data.decode import decode_part
from train.data.jpeg_header import JpegHeader
from train.data.prepare import PrepareConfig, prepare
from train.data.resizing import to_pixels
from train.data.restart_jpeg import RestartJpeg, add_restart_markers, jpegtran_is_installed
from train.data.sources import SourceError

BICUBIC = Image.Resampling.BICUBIC
needs_jpegtran = pytest.mark.skipif(not jpegtran_is_installed(), reason="there is no jpegtran")


def read(data):
    header = JpegHeader.read(data)
    return None if header is None else RestartJpeg.read(data, header)


def decoded(data, box, **options):
    return decode_part(data, lambda width, height: box, 224, BICUBIC, **options)


@pytest.mark.parametrize("options", [{"restart_marker_rows": 1}, {"restart_marker_blocks": 1}])
@pytest.mark.parametrize(("mode", "subsampling"), KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_cut_has_the_pixels_of_the_whole(options, mode, subsampling, data):
    size = (203, 141)  # no multiple of any block's edge
    whole = encoded(photograph(mode, size), subsampling=subsampling, **options)
    box = data.draw(boxes(*size))
    cut = read(whole).cut(box)
    assert (cut.box.width, cut.box.height) == (box.width, box.height)
    np.testing.assert_array_equal(opened(cut.data).crop(cut.box), opened(whole).crop(box))


def test_a_cut_is_smaller_than_the_whole():
    whole = encoded(photograph(), restart_marker_blocks=2)
    cut = read(whole).cut(Box(200, 150, 300, 250))
    assert len(cut.data) < len(whole) / 4
    assert opened(cut.data).size < (200, 150)


@pytest.mark.parametrize(("mode", "subsampling"), KINDS)
def test_decoding_is_the_same_with_restart_markers_and_without(mode, subsampling):
    """Both files hold the same coefficients."""
    picture = photograph(mode, (1203, 901))
    plain, marked = (encoded(picture, subsampling=subsampling, **more) for more in ({}, {"restart_marker_rows": 1}))
    assert read(marked) is not None
    for box in (Box(301, 117, 749, 565), Box(301, 1, 1201, 901), Box(0, 0, 1203, 901), Box(7, 500, 99, 640)):
        made, expected = (decoded(data, box, num_channels=len(mode)) for data in (marked, plain))
        np.testing.assert_array_equal(made, expected, str(box))


def test_what_is_outside_the_cut_is_never_looked_at():
    whole = encoded(photograph(), restart_marker_rows=1)
    jpeg = read(whole)
    damaged = bytearray(whole)
    damaged[jpeg.starts[2] : jpeg.ends[2]] = bytes(jpeg.ends[2] - jpeg.starts[2])
    box = Box(100, 150, 500, 390)
    made = decoded(bytes(damaged), box)
    np.testing.assert_array_equal(made, opened(whole).crop(box).resize((224, 224), BICUBIC))


@pytest.mark.parametrize(
    ("why", "data"),
    [
        ("no restart markers", encoded(photograph())),
        ("progressive", encoded(photograph(), progressive=True, restart_marker_rows=1)),
        ("intervals that do not divide a row", encoded(photograph(), restart_marker_blocks=7)),
        ("four colours", encoded(photograph("CMYK"), restart_marker_rows=1)),
        ("another format", (IMAGES / "chelsea_rgba.png").read_bytes()),
        ("no bits", encoded(photograph(), restart_marker_rows=1)[:600]),
        ("half of the bits", encoded(photograph(), restart_marker_rows=1)[:20_000]),
        ("nothing", b""),
        ("a start", b"\xff\xd8"),
    ],
)
def test_whatever_is_unusual_takes_the_long_way(why, data):
    assert read(data) is None, why


def test_a_lost_marker_is_noticed():
    whole = encoded(photograph(), restart_marker_rows=1)
    end = int(read(whole).ends[3])
    assert read(whole[:end] + whole[end + 2 :]) is None


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_images_are_upright_whatever_their_exif_says(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(photograph(), exif=exif, restart_marker_rows=1)
    box = Box(31, 22, 267, 245)
    upright = ImageOps.exif_transpose(opened(data))
    made = decoded(data, box)
    np.testing.assert_array_equal(made, upright.crop(box).resize((224, 224), BICUBIC))


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 1), ("L", 3)])
def test_other_colours_than_the_files_are_converted(mode, channels):
    data = encoded(photograph(mode), restart_marker_rows=1)
    box = Box(31, 22, 267, 245)
    made = decoded(data, box, num_channels=channels)
    expected = opened(data).convert("L" if channels == 1 else "RGB").crop(box).resize((224, 224), BICUBIC)
    np.testing.assert_array_equal(made, to_pixels(expected))


def test_truncated_files_are_refused():
    data = encoded(photograph(), restart_marker_rows=1)[:20_000]
    with pytest.raises(ImageError):
        decoded(data, Box(0, 0, 600, 400))


@needs_jpegtran
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 7}])
@pytest.mark.parametrize("size", [(600, 400), (500, 375), (333, 500), (1, 1), (481, 17)])
def test_adding_restart_markers_changes_no_pixel(options, size):
    data = encoded(photograph(size=size), **options)
    marked = add_restart_markers(data)
    assert read(marked) is not None
    np.testing.assert_array_equal(opened(marked), opened(data))
    assert add_restart_markers(marked) == marked


@needs_jpegtran
@pytest.mark.parametrize("data", [(IMAGES / "chelsea_rgba.png").read_bytes(), encoded(photograph())[:9000], b"text"])
def test_what_cannot_be_rewritten_keeps_its_bytes(data):
    assert add_restart_markers(data) == data


@needs_jpegtran
def test_packed_images_have_restart_markers_and_the_same_pixels(tmp_path):
    import tensorflow_datasets as tfds

    for number in range(6):
        path = tmp_path / "photos" / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photograph(size=(300 + number, 200))))
    config = PrepareConfig(f"folder:{tmp_path / 'photos'}", tmp_path / "out", held_out=0.3, restart_markers=True)
    packed = prepare(config)
    decoders = {"image": tfds.decode.SkipDecoding()}
    examples = tfds.builder_from_directory(packed.folder).as_data_source(split="train", decoders=decoders)
    for example in examples:
        original = (tmp_path / "photos" / example["file_name"].decode()).read_bytes()
        assert read(bytes(example["image"])) is not None
        np.testing.assert_array_equal(opened(bytes(example["image"])), opened(original))


def test_without_jpegtran_packing_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "jpegtran_is_installed", lambda: False)
    with pytest.raises(SourceError, match="apt install libjpeg-turbo-progs"):
        prepare(PrepareConfig("folder:anywhere", tmp_path, restart_markers=True))

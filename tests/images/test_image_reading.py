"""Every kind of image is read with its colours and upright; anything else is refused."""

import dataclasses
import io
import itertools
import struct
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from PIL import Image, ImageFile, features

from pictures import IMAGES, RAW, encode, raw
from poolformer_jax.images import ImageError, image_suffixes, is_upright, read_image
from selection import slow_after


def test_greyscale_is_repeated_and_a_network_with_one_channel_gets_luma():
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    expected = np.asarray(grey)[..., None]
    for form in (encode(grey), np.asarray(grey), np.asarray(grey)[..., None], np.asarray(grey)[None, :, :]):
        np.testing.assert_array_equal(raw(form), np.repeat(expected, 3, -1))
    one_channel = dataclasses.replace(RAW, image_mean=(0.5,), image_std=(0.5,))
    np.testing.assert_array_equal(one_channel(encode(grey))["pixel_values"][0], expected)
    red = Image.new("RGB", (2, 2), (255, 0, 0))
    assert one_channel(red)["pixel_values"].ravel().tolist() == [76] * 4  # 0.299 * 255, ITU-R 601


def test_palettes_are_converted_and_transparency_is_dropped():
    colours = Image.new("RGB", (2, 1))
    colours.putdata([(250, 0, 0), (0, 0, 250)])
    palette = colours.quantize(2)
    for transparency in (None, 0, bytes([0, 128])):
        options = {} if transparency is None else {"transparency": transparency}
        np.testing.assert_array_equal(raw(encode(palette, **options)), np.asarray(colours))
    rgba = colours.copy()
    rgba.putalpha(0)
    np.testing.assert_array_equal(raw(encode(rgba)), np.asarray(colours))
    np.testing.assert_array_equal(raw(np.asarray(rgba), input_data_format="channels_last"), np.asarray(colours))
    grey_alpha = Image.new("LA", (2, 2), (90, 0))
    assert np.unique(raw(encode(grey_alpha))).tolist() == [90]
    one_bit = Image.new("1", (2, 2), 1)
    assert np.unique(raw(encode(one_bit))).tolist() == [255]


def test_cmyk_is_not_inverted():
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan: red
    red, green, blue = raw(encode(cmyk, "JPEG", quality=100))[8, 8]
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_files_keep_the_high_byte(format):
    samples = np.array([[0, 255, 256], [0x1234, 0xFEDC, 0xFFFF]], np.uint16)
    expected = np.repeat((samples >> 8)[..., None], 3, -1)
    np.testing.assert_array_equal(raw(encode(Image.fromarray(samples), format)), expected)
    np.testing.assert_array_equal(raw(samples), expected)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_samples_without_a_range_are_refused(mode):
    with pytest.raises(ImageError, match=f"mode '{mode}'.*no known range"):
        raw(Image.new(mode, (4, 4)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone_once(orientation):
    upright = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6))
    # The picture as a camera stores it: rotated by the tag it is `upright`.
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, "PNG", exif=exif)
    expected = np.repeat(np.asarray(upright)[..., None], 3, -1)
    np.testing.assert_array_equal(raw(data), expected)
    np.testing.assert_array_equal(raw(Image.open(io.BytesIO(data))), expected)


def photo_with_exif(entries, values=b"", order="<", orientation_last=True):
    """A JPEG of 16 x 8 pixels whose EXIF has these entries (tag, type, count, value) and an orientation of 6."""
    orientation = [(ORIENTATION, 3, 1, 6 if order == "<" else 6 << 16)]
    entries = [*entries, *orientation] if orientation_last else [*orientation, *entries]
    tiff = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(entries))
    exif = b"Exif\0\0" + tiff + b"".join(struct.pack(f"{order}HHII", *entry) for entry in entries) + bytes(4) + values
    data = encode(Image.fromarray(np.zeros((8, 16, 3), np.uint8)), "JPEG")
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]


ORIENTATION = 0x112
# Type, count and value of entries that hold no number from 1 to 8.
NO_ORIENTATION = [(3, 1, 0), (3, 1, 9), (2, 1, ord("6")), (5, 1, 2**32 - 1), (4, 1, 2**32 - 1), (0xFFFF, 1, 6)]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow warns of damaged entries
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", slow_after(5, [0, 2, 7, 12, 0xFFFF, *set(range(14)) - {0, 2, 7, 12}, 16]))
def test_a_whole_photo_is_turned_whatever_else_its_exif_holds(kind, order):
    tags = (0x010F, 0x011A, 0x0128, 0x8769, 0x8825, 0x9204, 0xA005, 0xFFFF)
    for tag, count, value in itertools.product(tags, (1, 2**31), (0, 38)):
        for last in (False, True):
            photo = photo_with_exif([(tag, kind, count, value)], struct.pack(f"{order}ii", -1, 0), order, last)
            assert read_image(photo).size == (8, 16), (tag, count, value)
            assert not is_upright(Image.open(io.BytesIO(photo)))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(
    "exif",
    [
        *(b"", b"Exif\0\0", b"Exif\0\0II*\0", b"not EXIF", b"Exif\0\0II*\0\xff\xff\xff\xff"),
        *(b"Exif\0\0II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", 0x112, *entry) + bytes(4) for entry in NO_ORIENTATION),
    ],
)
def test_an_exif_without_an_orientation_leaves_a_photo_as_it_is(exif):
    data = encode(Image.new("RGB", (16, 8)), "JPEG")
    assert read_image(data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]).size == (16, 8)


def test_a_photo_is_turned_once():
    turned = read_image(photo_with_exif([]))
    assert read_image(turned).size == turned.size == (8, 16)


def test_heic_and_avif_photos_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("poolformer_jax.images.reading._formats", lambda: ("JPEG",))  # as without their packages
    for brand, message in (
        (b"heic", r"HEIC photo\. Install pillow-heif \(the extra heif\)"),
        (b"avif", "an AVIF image"),
    ):
        data = b"\0\0\0\x18ftyp" + brand + bytes(20)
        (tmp_path / "photo").write_bytes(data)
        for form in (data, tmp_path / "photo"):
            with pytest.raises(ImageError, match=message):
                read_image(form)


def test_heic_photos_are_read_if_the_extra_is_installed():
    pytest.importorskip("pillow_heif")
    photo = encode(Image.new("RGB", (64, 32), (200, 30, 30)), "HEIF", quality=100)
    assert np.abs(raw(photo).astype(int) - (200, 30, 30)).max() <= 4
    assert ".heic" in image_suffixes()


@pytest.mark.parametrize("form", [str, Path])
def test_a_url_keeps_its_slashes_in_the_message(form):
    with pytest.raises(ImageError, match=r"'https://example\.org/cat\.jpg'\. URLs are not downloaded"):
        read_image(form("https://example.org/cat.jpg"))


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("name", ["chelsea.jpg", "chelsea_rgba.png"])
def test_truncated_files_are_refused(name, share, tmp_path):
    data = (IMAGES / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: int(len(data) * share)])
    for form in (path, path.read_bytes()):
        with pytest.raises(ImageError, match=r"truncated or damaged|not an image that can be read"):
            raw(form)


def test_decompression_bombs_are_refused_if_pillow_only_warns(monkeypatch):
    data = encode(Image.new("L", (40, 40)))
    for limit in (1000, 100):  # within and beyond twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ImageError, match="decompression bomb"):
            raw(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_if_warnings_are_ignored(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="40 x 40 pixels"):
        raw(encode(Image.new("L", (40, 40))))


@pytest.mark.parametrize(("owner", "function"), [(Image, "open"), (ImageFile.ImageFile, "load")])
def test_a_memory_error_is_not_an_image_error(monkeypatch, owner, function):
    def no_memory(*_, **__):
        raise MemoryError

    monkeypatch.setattr(owner, function, no_memory)
    with pytest.raises(MemoryError):
        raw((IMAGES / "chelsea.jpg").read_bytes())


def test_a_memory_error_of_an_array_is_not_an_image_error():
    class TooLarge:
        def __array__(self, dtype=None, copy=None):
            raise MemoryError

    with pytest.raises(MemoryError):
        raw(TooLarge())


def test_drawings_are_refused_without_running_them():
    with pytest.raises(ImageError, match=r"is a drawing \(EPS\)"):
        raw(Image.open(io.BytesIO(encode(Image.new("RGB", (8, 8)), "EPS"))))


@pytest.mark.parametrize("format", ["EPS", "ICO", "PCX", "QOI", "SGI"])
def test_a_format_that_a_small_file_can_make_costly_is_named_among_others(format):
    data = encode(Image.new("RGB", (64, 64)), format)
    with pytest.raises(ImageError, match=r"its format is not JPEG, PNG, .*\. Convert it to PNG"):
        read_image(data)
    if format != "EPS":
        assert read_image(Image.open(io.BytesIO(data))).size == (64, 64)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "DIB", "TIFF", "PPM", "TGA"])
def test_the_formats_of_the_guide_are_read(format):
    assert read_image(encode(Image.new("RGB", (8, 4)), format)).size == (8, 4)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_jpeg_of_many_scans_is_refused(mode):
    data = encode(Image.new(mode, (16, 16)), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    assert read_image(data[:-2] + 80 * scan + data[-2:]).size == (16, 16)
    with pytest.raises(ImageError, match="has more than 100 scans"):
        read_image(data[:-2] + 100 * scan + data[-2:])


def test_a_jpeg_of_many_scans_of_one_colour_is_refused():
    data = encode(Image.new("RGB", (16, 16)), "JPEG")
    scan = b"\xff\xda\0\x08\1\1\0\0\x3f\0\0"
    with pytest.raises(ImageError, match="has more than 100 scans"):
        read_image(data[: data.index(b"\xff\xda")] + 101 * scan + data[-2:])


@pytest.mark.parametrize("place", ["a comment", "a film after the photo"])
def test_a_jpeg_may_hold_the_marker_of_scans_elsewhere(place):
    data, other = encode(Image.new("RGB", (16, 16)), "JPEG"), 200 * b"\xff\xda"
    comment = b"\xff\xfe" + (len(other) + 2).to_bytes(2) + other
    assert read_image(data[:2] + comment + data[2:] if place == "a comment" else data + other).size == (16, 16)


def test_the_first_picture_of_a_photo_that_holds_several_is_read():
    # As phones write them, with a gain map or the depth after the picture.
    picture, gain_map = Image.new("RGB", (16, 16), "red"), Image.new("L", (8, 8))
    data = encode(picture, "MPO", save_all=True, append_images=[gain_map])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert np.asarray(read_image(data))[0, 0].tolist() == [254, 0, 0]


def test_a_small_tiff_of_one_huge_tile_is_refused():
    entries = (
        (256, 1),
        (257, 1),
        (258, 8),
        (259, 8),
        (262, 1),
        (277, 1),
        (322, 20_000),
        (323, 20_000),
        (324, 8),
        (325, 8),
    )
    header = b"II*\0" + struct.pack("<IH", 8, len(entries))
    data = header + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries) + bytes(4)
    with pytest.raises(ImageError, match=r"A tile of the \d+ bytes given has more than"):
        read_image(data)


def test_the_first_frame_of_an_animation_is_read():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert raw(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("missing.jpg", "no image file 'missing.jpg'"),
        ("https://example.org/cat.jpg", "not downloaded"),
        ("long" * 2000, "File name too long"),
        (b"", "0 bytes given is not an image that can be read: it is damaged, or its format is not JPEG"),
        (b"%PDF-1.4 not a picture", "Convert it to PNG"),
        (12, "type int cannot be read"),
        (io.BytesIO(b"an open file, which has lines"), "type BytesIO cannot be read"),
        (SimpleNamespace(__array__=None), "SimpleNamespace cannot be converted to a NumPy array"),
        (np.zeros((5, 5, 2), np.uint8), "is not an image"),
        (np.zeros((3, 200, 3), np.uint8), "channels first or last"),
        (np.zeros((2, 2, 2, 2, 3), np.uint8), "is not an image"),
        (np.zeros((0, 5, 3), np.uint8), "has no pixels"),
        (np.zeros((8, 8), np.int64), "int64 has no known range"),
        (np.full((8, 8), 255.0), "values from 255 to 255"),
        (np.full((8, 8), -0.5), "values from -0.5 to -0.5"),
        (np.full((8, 8), np.nan), "nan"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else type(value).__name__,
)
def test_anything_but_a_picture_is_refused_with_the_reason(image, message):
    with pytest.raises(ImageError, match=message):
        raw(image)


def test_bfloat16_arrays_are_read():
    image = np.array([[0, 0.25, 0.5, 1]], ml_dtypes.bfloat16)
    assert raw(image)[0, :, 0].tolist() == [0, 64, 128, 255]
    with pytest.raises(ImageError, match="values from 0 to 255"):
        raw(np.array([[0, 255]], ml_dtypes.bfloat16))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_are_accepted_if_they_round_to_8_bits(dtype):
    just_outside = np.array([[-1e-3, 0, 0.5, 1, 1 + 1e-3]], dtype)  # as after resizing in floating point
    assert raw(just_outside)[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    for outside in (-2.1e-3, 1 + 3e-3):  # half a step of 1/255 is 1.96e-3, and float16 has 9.8e-4 between two
        with pytest.raises(ImageError, match="Expected 0 to 1"):
            raw(np.full((2, 2), outside, dtype))


def test_one_error_names_every_bad_image():
    with pytest.raises(ImageError, match=r"(?s)image 1: .*missing\.png.*image 2: .*int cannot be read"):
        RAW.preprocess([IMAGES / "coffee.jpg", "missing.png", 5])
    with pytest.raises(ImageError, match="No image was given"):
        RAW.preprocess([])
    with pytest.raises(ImageError, match="different sizes"):
        RAW.preprocess([np.zeros((5, 5), np.uint8), np.zeros((5, 6), np.uint8)])


def test_the_channel_order_of_an_ambiguous_array_can_be_given():
    image = np.arange(3 * 200 * 3, dtype=np.uint8).reshape(3, 200, 3)
    assert raw(image, input_data_format="channels_last").shape == (3, 200, 3)
    assert raw(image, input_data_format="channels_first").shape == (200, 3, 3)


@pytest.mark.skipif(not features.check("webp"), reason="this Pillow was built without WebP")
def test_lossless_webp_is_read():
    colours = np.random.default_rng(1).integers(0, 256, (9, 11, 3), np.uint8)
    np.testing.assert_array_equal(raw(encode(Image.fromarray(colours), "WEBP", lossless=True)), colours)

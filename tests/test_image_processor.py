"""Preprocessing: equal to `transformers` on photographs, and never a wrong picture for the odd ones."""

import dataclasses
import io
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, features

from poolformer_jax.image_processor import PoolFormerImageProcessor
from poolformer_jax.image_reading import ImageError

HERE = Path(__file__).parent
IMAGES = HERE / "images"
GOLDEN = np.load(HERE / "golden" / "image_processor.npz")
PHOTOGRAPHS = sorted({name.split("/")[0] for name in GOLDEN.files})


def square(size, crop_pct=0.9, **changes):
    sides = {"height": size, "width": size}
    return PoolFormerImageProcessor(size={"shortest_edge": size}, crop_size=sides, crop_pct=crop_pct, **changes)


# Pixels as they are, so that a test can say which colour it expects.
RAW = PoolFormerImageProcessor(do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)


def raw(image, **options):
    return RAW.preprocess(image, **options)["pixel_values"][0]


def encode(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("crop_pct", [0.9, 0.95])
@pytest.mark.parametrize("size", [224, 64])
def test_photographs_equal_transformers(name, crop_pct, size):
    processor = square(size, crop_pct)
    pixels = processor.preprocess(IMAGES / name)["pixel_values"][0]
    golden = {key: GOLDEN[f"{name}/crop{crop_pct}/size{size}/{key}"] for key in ("shape", "index", "value")}
    assert pixels.dtype == np.float32
    assert pixels.shape == tuple(golden["shape"])
    np.testing.assert_allclose(pixels.ravel()[golden["index"]], golden["value"], rtol=0, atol=1e-6)
    means = GOLDEN[f"{name}/crop{crop_pct}/size{size}/channel_mean"]
    np.testing.assert_allclose(pixels.mean((0, 1), dtype=np.float64), means, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_path_bytes_pillow_and_arrays_give_the_same_pixels(name):
    path = IMAGES / name
    picture = Image.open(path)
    colours = np.asarray(picture.convert("RGB"))
    expected = PoolFormerImageProcessor().preprocess(path)["pixel_values"]
    forms = [
        str(path),
        path.read_bytes(),
        picture,
        colours,
        np.moveaxis(colours, -1, 0),
        colours / 255,
        jnp.asarray(colours),
    ]
    for form in forms:
        np.testing.assert_array_equal(PoolFormerImageProcessor().preprocess(form)["pixel_values"], expected)
    batch = PoolFormerImageProcessor().preprocess(iter(forms))["pixel_values"]
    np.testing.assert_array_equal(batch, np.repeat(expected, len(forms), 0))
    four_axes = PoolFormerImageProcessor().preprocess(np.stack([colours, colours]))["pixel_values"]
    np.testing.assert_array_equal(four_axes, np.repeat(expected, 2, 0))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crop_pct": None},
        {"do_center_crop": False},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_resize": False},
        {"do_resize": False, "do_rescale": False, "do_normalize": False},
        {"resample": 2, "rescale_factor": 1 / 127.5},
        {"size": {"height": 96, "width": 96}},
        {"size": {"height": 96, "width": 130}},
        {"size": {"height": 96, "width": 130}, "crop_pct": None},
        {"crop_size": {"height": 301, "width": 75}},
    ],
    ids=str,
)
@pytest.mark.live
def test_every_flag_equals_transformers(changes):
    pytest.importorskip("transformers")
    from transformers.models.poolformer.image_processing_pil_poolformer import PoolFormerImageProcessorPil

    processor = PoolFormerImageProcessor(**changes)
    theirs = PoolFormerImageProcessorPil.from_dict(processor.to_dict())
    rng = np.random.default_rng(0)
    pictures = [Image.open(IMAGES / "coffee.jpg")]
    pictures += [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in [(37, 91), (5, 3), (1, 1)]]
    for picture in pictures:
        expected = np.moveaxis(np.asarray(theirs(picture)["pixel_values"][0]), 0, -1)
        np.testing.assert_allclose(processor(picture)["pixel_values"][0], expected, rtol=0, atol=1e-6)


def test_scale_and_shift_is_normalisation_to_float32_rounding():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    for processor in (PoolFormerImageProcessor(), RAW, dataclasses.replace(RAW, do_normalize=True)):
        scale, shift = processor.scale_and_shift()
        np.testing.assert_allclose(pixels * scale + shift, processor.normalize(pixels), rtol=1e-6, atol=1e-6)


def test_greyscale_is_repeated_and_one_channel_networks_get_luma():
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    expected = np.asarray(grey)[..., None]
    for form in (encode(grey), np.asarray(grey), np.asarray(grey)[..., None], np.asarray(grey)[None, :, :]):
        np.testing.assert_array_equal(raw(form), np.repeat(expected, 3, -1))
    one_channel = dataclasses.replace(RAW, image_mean=(0.5,), image_std=(0.5,))
    np.testing.assert_array_equal(one_channel(encode(grey))["pixel_values"][0], expected)
    red = Image.new("RGB", (2, 2), (255, 0, 0))
    assert one_channel(red)["pixel_values"].ravel().tolist() == [76] * 4  # 0.299 * 255, ITU-R 601


def test_palettes_are_resolved_and_transparency_shows_the_colour_below():
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


def test_cmyk_is_the_colour_and_not_its_negative():
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
    # What a camera stores, so that turning it by the tag gives `upright`.
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, "PNG", exif=exif)
    expected = np.repeat(np.asarray(upright)[..., None], 3, -1)
    np.testing.assert_array_equal(raw(data), expected)
    np.testing.assert_array_equal(raw(Image.open(io.BytesIO(data))), expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 300), (10, 10000), (10000, 10)])
def test_tiny_and_thin_images_come_out_at_the_crop_size(size):
    picture = Image.new("RGB", size, (12, 200, 90))
    small = square(32, do_normalize=False, do_rescale=False)
    pixels = small(picture)["pixel_values"]
    assert pixels.shape == (1, 32, 32, 3)
    assert np.unique(pixels.reshape(-1, 3), axis=0).tolist() == [[12, 200, 90]]


def test_too_thin_to_resize_is_refused():
    with pytest.raises(ImageError, match="1 x 3000000 pixels would be resized to 248 x 744000000"):
        PoolFormerImageProcessor()(Image.new("L", (1, 3_000_000)))


def test_an_image_smaller_than_the_crop_gets_a_black_margin():
    cropping = dataclasses.replace(RAW, do_center_crop=True, crop_size={"height": 5, "width": 5})
    pixels = cropping(np.full((2, 8), 200, np.uint8))["pixel_values"]
    rows = pixels[0, :, 0, 0].tolist()
    assert rows == [0, 0, 200, 200, 0]  # the larger half of the margin in front, as in transformers
    assert pixels.shape == (1, 5, 5, 3)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("name", ["chelsea.jpg", "chelsea_rgba.png"])
def test_truncated_files_are_refused(name, share, tmp_path):
    data = (IMAGES / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: int(len(data) * share)])
    for form in (path, path.read_bytes()):
        with pytest.raises(ImageError, match=r"truncated or damaged|not an image that Pillow can read"):
            raw(form)


def test_decompression_bombs_are_refused_where_pillow_only_warns(monkeypatch):
    data = encode(Image.new("L", (40, 40)))
    for limit in (1000, 100):  # within and beyond twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ImageError, match="attack by decompression"):
            raw(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_where_warnings_are_silent(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="40 x 40 pixels"):
        raw(encode(Image.new("L", (40, 40))))


def test_drawings_are_refused_before_anything_runs_them():
    with pytest.raises(ImageError, match=r"is a drawing \(EPS\)"):
        raw(encode(Image.new("RGB", (8, 8)), "EPS"))


def test_the_first_frame_of_an_animation_counts():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert raw(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("missing.jpg", "no image file 'missing.jpg'"),
        ("https://example.org/cat.jpg", "not downloaded"),
        ("long" * 2000, "File name too long"),
        (b"", "0 bytes given is not an image that Pillow can read: it is of no format that it knows"),
        (b"%PDF-1.4 not a picture", "not an image that Pillow can read"),
        (12, "type int cannot be read"),
        (io.BytesIO(b"an open file, which has lines"), "type BytesIO cannot be read"),
        (SimpleNamespace(__array__=None), "SimpleNamespace does not become a NumPy array"),
        (np.zeros((5, 5, 2), np.uint8), "is no image"),
        (np.zeros((3, 200, 3), np.uint8), "channels first or last"),
        (np.zeros((2, 2, 2, 2, 3), np.uint8), "is no image"),
        (np.zeros((0, 5, 3), np.uint8), "holds no pixel"),
        (np.zeros((8, 8), np.int64), "int64 has no known range"),
        (np.full((8, 8), 255.0), "values from 0 to 255"),
        (np.full((8, 8), -0.5), "values from -0.5 to 0"),
        (np.full((8, 8), np.nan), "nan"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_picture_is_refused_with_the_reason(image, message):
    with pytest.raises(ImageError, match=message):
        raw(image)


def test_one_error_names_every_bad_image():
    with pytest.raises(ImageError, match=r"(?s)image 1: .*missing\.png.*image 2: .*int cannot be read"):
        RAW.preprocess([IMAGES / "coffee.jpg", "missing.png", 5])
    with pytest.raises(ImageError, match="No image was given"):
        RAW.preprocess([])
    with pytest.raises(ImageError, match="different sizes"):
        RAW.preprocess([np.zeros((5, 5), np.uint8), np.zeros((5, 6), np.uint8)])


def test_channel_order_of_an_ambiguous_array_can_be_said():
    image = np.arange(3 * 200 * 3, dtype=np.uint8).reshape(3, 200, 3)
    assert raw(image, input_data_format="channels_last").shape == (3, 200, 3)
    assert raw(image, input_data_format="channels_first").shape == (200, 3, 3)


def test_a_saved_processor_reads_back_equal(tmp_path):
    processor = PoolFormerImageProcessor.for_variant("m48", crop_size={"height": 64, "width": 48})
    assert processor.crop_pct == 0.95
    processor.save_pretrained(tmp_path)
    assert PoolFormerImageProcessor.from_pretrained(tmp_path) == processor
    assert PoolFormerImageProcessor.from_pretrained(tmp_path / "preprocessor_config.json") == processor
    assert [path.name for path in tmp_path.iterdir()] == ["preprocessor_config.json"]
    assert pickle.loads(pickle.dumps(processor)) == processor
    assert {processor: "hashable"}[dataclasses.replace(processor)] == "hashable"


def test_the_published_file_of_2022_is_understood():
    # What sail/poolformer_m36 has on the Hub: integers, and one flag for resize and crop.
    published = {
        "crop_pct": 0.95,
        "do_normalize": True,
        "do_resize_and_center_crop": True,
        "feature_extractor_type": "PoolFormerFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "size": 224,
    }
    assert PoolFormerImageProcessor.from_dict(published) == PoolFormerImageProcessor.for_variant("m36")
    off = PoolFormerImageProcessor.from_dict({**published, "do_resize_and_center_crop": False})
    assert not off.do_resize and not off.do_center_crop


def test_timms_config_is_understood(tmp_path):
    pretrained = {
        "input_size": [3, 224, 224],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "poolformer_s12", "pretrained_cfg": pretrained}))
    assert PoolFormerImageProcessor.from_pretrained(tmp_path) == PoolFormerImageProcessor()
    with pytest.raises(ValueError, match="squash"):
        PoolFormerImageProcessor.from_dict({**pretrained, "crop_mode": "squash"})


def test_a_source_without_preprocessing_says_what_was_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no preprocessor_config\.json"):
        PoolFormerImageProcessor.from_pretrained(tmp_path)


def test_the_hubs_cache_is_read_without_asking_the_hub(tmp_path):
    pytest.importorskip("huggingface_hub")
    repository = tmp_path / "models--sail--poolformer_m36"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    PoolFormerImageProcessor.for_variant("m36").save_pretrained(snapshot)
    offline = {"cache_dir": tmp_path, "local_files_only": True}
    processor = PoolFormerImageProcessor.from_pretrained("sail/poolformer_m36", **offline)
    assert processor == PoolFormerImageProcessor.for_variant("m36")
    with pytest.raises(FileNotFoundError, match=r"sail/poolformer_s99 has no preprocessor_config\.json"):
        PoolFormerImageProcessor.from_pretrained("sail/poolformer_s99", **offline)


def test_bad_settings_are_listed_together():
    with pytest.raises(ValueError, match=r"(?s)size=\{'longest': 3\}.*crop_pct=1.5.*resample=9.*image_std=\(1.0,\)"):
        PoolFormerImageProcessor(size={"longest": 3}, crop_pct=1.5, resample=9, image_std=(1.0,))
    with pytest.raises(ValueError, match=r"do_pad=True, pad_size=\{'height': 3\}"):
        PoolFormerImageProcessor.from_dict({"do_pad": True, "pad_size": {"height": 3}})


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{broken", r"preprocessor_config\.json is no JSON .*save_pretrained\(folder\) writes it"),
        ("[224]", r"preprocessor_config\.json holds a list"),
        ('{"size": "224", "image_mean": 0.5, "crop_pct": "0.9"}', "(?s)size='224'.*image_mean=0.5.*crop_pct='0.9'"),
        ('{"interpolation": "bicubic", "mean": [0.5]}', "no list input_size, std"),
    ],
)
def test_a_malformed_file_is_named_or_its_entries_are_listed(written, message, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(written)
    with pytest.raises(ValueError, match=message):
        PoolFormerImageProcessor.from_pretrained(tmp_path)


@pytest.mark.skipif(not features.check("webp"), reason="this Pillow was built without WebP")
def test_lossless_webp_is_read():
    colours = np.random.default_rng(1).integers(0, 256, (9, 11, 3), np.uint8)
    np.testing.assert_array_equal(raw(encode(Image.fromarray(colours), "WEBP", lossless=True)), colours)

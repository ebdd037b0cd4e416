"""The preprocessing equals that of `transformers` on photographs, and handles thin and tiny pictures."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from paths import TESTS
from pictures import IMAGES, RAW
from poolformer_jax.images import ImageError, PoolFormerImageProcessor

HERE = TESTS
GOLDEN = np.load(HERE / "golden" / "image_processor.npz")
PHOTOGRAPHS = sorted({name.split("/")[0] for name in GOLDEN.files})


def square(size, crop_pct=0.9, **changes):
    sides = {"height": size, "width": size}
    return PoolFormerImageProcessor(size={"shortest_edge": size}, crop_size=sides, crop_pct=crop_pct, **changes)


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

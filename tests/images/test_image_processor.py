"""The preprocessing equals that of `transformers` on photographs, and handles thin and tiny pictures."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from golden import image_processor_cases
from paths import TESTS
from pictures import IMAGES, RAW
from poolformer_jax.images import ImageError, PoolFormerFeatureExtractor, PoolFormerImageProcessor

HERE = TESTS
GOLDEN = np.load(HERE / "golden" / "image_processor.npz")
PHOTOGRAPHS = sorted({name.split("/")[0] for name in GOLDEN.files} - {"cases"})
KEYWORD_IMAGES = image_processor_cases.images()


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


@pytest.mark.skipif(not hasattr(Image.Resampling, "MKS2021"), reason="the golden arrays have the filters of Pillow 13")
@pytest.mark.parametrize("name", KEYWORD_IMAGES)
def test_every_keyword_in_every_form_gives_the_pixels_of_transformers(name):
    cases = [case for case in image_processor_cases.keywords() if image_processor_cases.is_comparable(name, case)]
    shapes, values = GOLDEN[f"cases/{name}/shape"], GOLDEN[f"cases/{name}/value"]
    for case, shape, value in zip(cases, shapes, values, strict=True):
        if case.get("return_tensors") != "pt":
            pixels = PoolFormerImageProcessor()(KEYWORD_IMAGES[name], **case).pixel_values
            assert pixels.shape == tuple(shape), case
            np.testing.assert_allclose(
                image_processor_cases.sample(pixels), value, rtol=0, atol=1e-6, err_msg=str(case)
            )


@pytest.mark.parametrize("name", image_processor_cases.UNIT_FLOATS[1:3])
def test_floats_from_0_to_1_are_rescaled_once(name):
    colours = PoolFormerImageProcessor()(KEYWORD_IMAGES["array"]).pixel_values
    np.testing.assert_array_equal(PoolFormerImageProcessor()(KEYWORD_IMAGES[name]).pixel_values, colours)
    unscaled = PoolFormerImageProcessor()(KEYWORD_IMAGES[name], do_rescale=False).pixel_values
    np.testing.assert_allclose(unscaled, colours, atol=2 / 255 / 0.224)  # rounded down to 8 bits, as in transformers


def test_floats_beyond_8_bits_are_refused_only_for_resizing():
    floats = np.linspace(-3, 300, 48).reshape(4, 4, 3)
    with pytest.raises(ImageError, match=r"values from -3 to 300\. Expected 0 to 1, or whole numbers from 0 to 255"):
        PoolFormerImageProcessor()(floats, input_data_format="channels_last")
    as_they_are = PoolFormerImageProcessor(do_resize=False, do_rescale=False, do_center_crop=False, do_normalize=False)
    np.testing.assert_allclose(as_they_are(floats, input_data_format="channels_last").pixel_values[0], floats, 1e-6)


def test_keywords_of_the_constructor_have_the_same_forms():
    expected = PoolFormerImageProcessor(
        size={"shortest_edge": 48},
        crop_size={"height": 40, "width": 40},
        resample=2,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.25, 0.25, 0.25),
    )
    numbers = {"size": 48, "crop_size": 40, "image_mean": 0.5, "image_std": 0.25}
    for resample in (2, "bilinear", Image.Resampling.BILINEAR):
        assert PoolFormerImageProcessor(**numbers, resample=resample) == expected
    assert PoolFormerImageProcessor(size=[3, 4]).size == {"height": 3, "width": 4}
    grey = PoolFormerImageProcessor(image_mean=[0.5], image_std=0.25)
    assert grey.image_std == (0.25,)
    assert grey(KEYWORD_IMAGES["rgb"], image_mean=0.1, image_std=0.2).pixel_values.shape == (1, 224, 224, 1)


def test_the_result_is_a_dictionary_with_attributes():
    processor = PoolFormerFeatureExtractor()
    inputs = processor(KEYWORD_IMAGES["rgb"])
    assert dict(**inputs)["pixel_values"] is inputs.pixel_values is inputs["pixel_values"]
    with pytest.raises(AttributeError, match=r"no 'pixel_value'. It has: pixel_values"):
        _ = inputs.pixel_value
    assert pickle.loads(pickle.dumps(inputs)).keys() == inputs.keys()
    on_device = jax.device_put(processor(KEYWORD_IMAGES["rgb"]))  # a pytree
    assert isinstance(on_device.pixel_values, jax.Array)
    first = processor(KEYWORD_IMAGES["rgb"], data_format="channels_first", return_tensors="jax").pixel_values
    assert isinstance(first, jax.Array)
    np.testing.assert_array_equal(np.moveaxis(first, 1, -1), inputs.pixel_values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"banana": 1, "sise": 3}, r"Unknown keywords: banana=1, sise=3\. Expected: crop_pct, "),
        ({"return_tensors": "tf"}, r"return_tensors='tf'\. Expected 'np', 'jax', 'pt'"),
        ({"data_format": "none"}, "data_format='none'"),
        ({"input_data_format": "nchw"}, "input_data_format='nchw'"),
        ({"device": "cuda"}, "device='cuda'.*processed on the CPU"),
        ({"size": {"longest_edge": 3}}, "size={'longest_edge': 3}"),
        ({"do_pad": True, "pad_size": 20}, "25 x 25 pixels is larger than pad_size 20 x 20"),
        ({"do_pad": True, "pad_size": {"shortest_edge": 20}}, "pad_size="),
    ],
)
def test_keywords_that_cannot_be_used_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PoolFormerImageProcessor()(KEYWORD_IMAGES["array"], **{**image_processor_cases.SMALL, **options})


def test_a_picture_as_nested_lists_of_numbers_is_refused_in_few_lines():
    with pytest.raises(ImageError, match=r"image 19: [^\n]*type list cannot be read[^\n]*\nand 44 more"):
        PoolFormerImageProcessor()(np.zeros((8, 8, 3)).tolist())


def test_padding_makes_a_batch_of_different_sizes():
    pictures = [np.full((2, 5), 9, np.uint8), np.full((4, 3), 9, np.uint8)]
    pixels = RAW(pictures, do_pad=True).pixel_values
    assert pixels.shape == (2, 4, 5, 3)
    assert np.count_nonzero(pixels) == 3 * (10 + 12)


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


def test_the_8_bits_that_devices_normalise_give_what_preprocess_gives():
    rng = np.random.default_rng(0)
    transparent, numbers = rng.integers(0, 256, (80, 70, 4), np.uint8), rng.integers(0, 256, (80, 70, 3))
    for changes, image in (
        ({"do_convert_rgb": True}, transparent),
        ({"do_convert_rgb": True}, Image.fromarray(transparent)),
        ({}, numbers),
        ({}, numbers.astype(np.float32)),
        ({"do_rescale": False}, numbers.astype(np.float32)),
        ({"do_resize": False}, numbers),
    ):
        processor = square(64, **changes)
        expected = processor(image).pixel_values[0]
        np.testing.assert_allclose(processor.normalize(processor.resize_and_crop(image)), expected, atol=1e-5)
        np.testing.assert_allclose(
            processor.normalize(processor.resize_and_crop(processor.read(image))), expected, atol=1e-5
        )
    for changes in ({"do_rescale": False}, {"do_rescale": False, "do_resize": False}):
        with pytest.raises(ImageError, match="Expected whole numbers from 0 to 255, because batches hold 8 bits"):
            square(64, **changes).resize_and_crop(numbers / 255)

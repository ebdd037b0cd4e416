"""The image processor beside that of `transformers`: every keyword, every image, the files."""

import inspect

import numpy as np
import pytest

from golden import image_processor_cases as cases
from poolformer_jax import PoolFormerImageProcessor

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.live
IMAGES = cases.images()
# What differs from transformers on purpose.
DIFFERENT = {
    "data_format": "transformers' Pillow backend ignores it and returns channels first; here it decides, and the "
    "default is channels last",
    "input_data_format": "an array that could have its channels first or last needs it; transformers guesses first",
    "device": "any but the CPU is refused; transformers' Pillow backend ignores it",
    "do_rescale": "floats from 0 to 1 are divided by 255 once; transformers divides them twice",
    "do_convert_rgb": "images are converted to the network's channels without it too; transformers refuses them",
    "size": "longest_edge, max_height and max_pixels are refused; transformers refuses or ignores them with a crop_pct",
}


def theirs():
    from transformers.models.poolformer.image_processing_pil_poolformer import PoolFormerImageProcessorPil

    return PoolFormerImageProcessorPil


def channels_last(inputs):
    return np.stack([np.moveaxis(np.asarray(pixels), 0, -1) for pixels in inputs["pixel_values"]])


def test_every_keyword_of_transformers_is_tested():
    keywords = set(theirs().valid_kwargs.__annotations__)
    assert keywords == {*cases.FORMS, "data_format"}
    assert set(DIFFERENT) <= keywords
    ours = set(PoolFormerImageProcessor().to_dict()) | set(inspect.signature(PoolFormerImageProcessor).parameters)
    assert set(theirs()().to_dict()) <= ours


@pytest.mark.parametrize("name", IMAGES)
def test_every_keyword_gives_the_pixels_of_transformers(name):
    for case in cases.keywords():
        if cases.is_comparable(name, case):
            inputs = PoolFormerImageProcessor()(IMAGES[name], **case)
            expected = theirs()()(IMAGES[name], **case)
            if case.get("return_tensors") == "pt":
                assert isinstance(inputs.pixel_values, torch.Tensor)
            np.testing.assert_allclose(
                np.asarray(inputs.pixel_values), channels_last(expected), rtol=0, atol=1e-6, err_msg=str(case)
            )


@pytest.mark.parametrize("name", IMAGES)
def test_enums_and_tensors_of_transformers_are_taken(name):
    from transformers.image_utils import ChannelDimension, SizeDict
    from transformers.utils import TensorType

    case = {"size": SizeDict(height=40, width=50), "do_convert_rgb": True, "do_rescale": False}
    expected = np.stack(theirs()()(IMAGES[name], **{**case, "size": [40, 50]})["pixel_values"])
    tensors = PoolFormerImageProcessor()(
        IMAGES[name], **case, return_tensors=TensorType.PYTORCH, data_format=ChannelDimension.FIRST
    )
    np.testing.assert_allclose(tensors.pixel_values.numpy(), expected, rtol=0, atol=1e-6)
    if isinstance(IMAGES[name], np.ndarray):
        as_tensor = PoolFormerImageProcessor()(torch.tensor(IMAGES[name]), **case, data_format="channels_first")
        np.testing.assert_array_equal(as_tensor.pixel_values, tensors.pixel_values.numpy())


@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_a_given_data_format_of_an_ambiguous_array_is_used(data_format):
    from transformers.image_utils import ChannelDimension

    array = np.random.default_rng(0).integers(0, 256, (3, 40, 3), np.uint8)
    for given in (data_format, ChannelDimension(data_format)):
        pixels = PoolFormerImageProcessor()(array, input_data_format=given).pixel_values
        expected = channels_last(theirs()()(array, input_data_format=given))
        np.testing.assert_allclose(pixels, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crop_pct": None},
        {"size": 50, "crop_size": [30, 40]},
        {"size": [96, 130], "crop_pct": None},
        {"resample": 2, "rescale_factor": 1 / 127.5},
        {"image_mean": 0.5, "image_std": 0.25, "do_convert_rgb": True},
        {"do_center_crop": False, "do_rescale": False, "do_normalize": False},
    ],
    ids=str,
)
def test_files_and_keywords_of_from_pretrained_mean_the_same(changes, tmp_path):
    ours = PoolFormerImageProcessor(**changes)
    ours.save_pretrained(tmp_path / "ours")
    assert ours.to_json_string() == theirs().from_pretrained(tmp_path / "ours").to_json_string()
    theirs()().save_pretrained(tmp_path / "theirs")
    read_ours = PoolFormerImageProcessor.from_pretrained(tmp_path / "theirs", **changes)
    read_theirs = theirs().from_pretrained(tmp_path / "theirs", **changes)
    for read in (ours, read_ours):
        pixels = read(IMAGES["rgb"]).pixel_values
        np.testing.assert_allclose(pixels, channels_last(read_theirs(IMAGES["rgb"])), rtol=0, atol=1e-6)

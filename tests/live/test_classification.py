"""From a picture to probabilities, side by side with `transformers`: its folder, its processor, its network."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from poolformer_jax import ImageClassifier

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("optimised")]
PHOTOGRAPHS = sorted((Path(__file__).parent.parent / "images").glob("*.*g"))


@pytest.mark.parametrize("crop_pct", [0.9, 0.95])
def test_a_folder_of_transformers_classifies_photographs_as_transformers_does(crop_pct, tmp_path):
    from transformers.models.poolformer.image_processing_pil_poolformer import PoolFormerImageProcessorPil

    torch.manual_seed(0)
    labels = {index: f"label {index}" for index in range(12)}
    config = transformers.PoolFormerConfig(depths=[1, 1, 2, 1], layer_scale_init_value=0.3, id2label=labels)
    theirs = transformers.PoolFormerForImageClassification(config).eval()
    with torch.no_grad():  # a new head gives almost the same logits for all pictures
        theirs.classifier.weight.mul_(20)
    theirs.save_pretrained(tmp_path)
    processor = PoolFormerImageProcessorPil(crop_pct=crop_pct)
    processor.save_pretrained(tmp_path)

    pictures = [Image.open(path).convert("RGB") for path in PHOTOGRAPHS]
    pixel_values = torch.from_numpy(np.stack(processor(pictures)["pixel_values"]))
    with torch.no_grad():
        expected = theirs(pixel_values).logits.softmax(-1).numpy()
    for result, probabilities in zip(ImageClassifier.from_pretrained(tmp_path)(PHOTOGRAPHS, 12), expected, strict=True):
        ours = dict(result)
        np.testing.assert_allclose([ours[label] for label in labels.values()], probabilities, atol=1e-5)
        assert result[0].label == labels[int(probabilities.argmax())]

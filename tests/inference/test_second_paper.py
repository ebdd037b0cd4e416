"""Saved networks of the second paper classify, embed and explain images as the models compute them."""

import jax
import numpy as np
import pytest

from poolformer_jax import GradCam, ImageClassifier, ImageEmbedder, PoolFormerForImageClassification, load_pretrained
from poolformer_jax.cli import main
from poolformer_jax.weights import save_pretrained
from small_networks import FAMILY, IMAGES, PROCESSOR, random_variables

PHOTOGRAPH = IMAGES / "chelsea.jpg"


@pytest.mark.parametrize("kind", ["caformer", pytest.param("randformer", marks=pytest.mark.slow)])
def test_a_saved_network_classifies_embeds_and_explains(kind, tmp_path, capsys):
    model, variables = random_variables(FAMILY[kind])
    save_pretrained(tmp_path, model, variables, image_processor=PROCESSOR)
    pixels = PROCESSOR.preprocess(PHOTOGRAPH)["pixel_values"]
    expected = jax.device_get(jax.jit(model.apply)(variables, pixels))
    probabilities = np.asarray(jax.nn.softmax(expected.logits[0]))

    (best,) = ImageClassifier.from_pretrained(tmp_path, batch_size=1)(PHOTOGRAPH, top_k=1)
    assert best.label == f"class {probabilities.argmax()}"
    assert best.probability == pytest.approx(probabilities.max(), abs=1e-5)

    embedding = ImageEmbedder.from_pretrained(tmp_path, batch_size=1, feature_maps=True)(PHOTOGRAPH)
    for ours, theirs in zip(embedding.feature_maps, expected.hidden_states, strict=True):
        np.testing.assert_allclose(ours, theirs[0], rtol=0, atol=1e-5 * np.abs(theirs).max())
    headless = PoolFormerForImageClassification(FAMILY[kind].with_changes(num_labels=0))
    backbone = {name: branch for name, branch in variables["params"].items() if name != "head"}
    features = jax.jit(headless.apply)({**variables, "params": backbone}, pixels).logits[0]
    np.testing.assert_allclose(embedding.features, features, rtol=0, atol=1e-5 * np.abs(features).max())

    loaded, stored = load_pretrained(tmp_path)
    explanation = GradCam(loaded.config, stored, PROCESSOR)(PHOTOGRAPH)
    assert explanation.probability == pytest.approx(probabilities.max(), abs=1e-5)
    assert explanation.heatmap.max() > 0.99

    assert main(["summary", str(tmp_path)]) == 0
    learnt = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert f"{learnt:,}" in capsys.readouterr().out

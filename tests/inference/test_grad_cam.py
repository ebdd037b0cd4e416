"""Grad-CAM maps show where in the image the evidence for a class is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poolformer_jax import PoolFormerConfig, PoolFormerImageProcessor, save_pretrained
from poolformer_jax.inference.grad_cam import Explanation, GradCam, jet
from poolformer_jax.network import functional
from small_networks import IMAGES, PROCESSOR, TINY, TWO_STAGES, random_variables

PHOTOGRAPH = IMAGES / "chelsea.jpg"


def test_the_heatmap_is_grad_cam_of_the_last_stage():
    config = PoolFormerConfig(**TINY)
    model, variables = random_variables(config)
    explanation = GradCam(config, variables, PROCESSOR)(PHOTOGRAPH)
    output = jax.jit(model.apply)(variables, PROCESSOR.preprocess(PHOTOGRAPH)["pixel_values"])
    assert explanation.label == int(output.logits.argmax())
    assert explanation.probability == pytest.approx(float(jax.nn.softmax(output.logits).max()), abs=1e-5)

    # Equations 1 and 2 of arXiv 1610.02391, on the network that is not folded.
    def score(features):
        norm, head = variables["params"]["norm"], variables["params"]["head"]
        pooled = functional.group_norm(features, norm["scale"], norm["bias"]).mean((1, 2))
        return (pooled @ head["kernel"] + head["bias"])[0, explanation.label]

    features = output.hidden_states[-1]
    weights = jax.jit(jax.grad(score))(features).mean((0, 1, 2))
    evidence = np.maximum(features[0] @ weights, 0)
    enlarged = jax.image.resize(evidence, (64, 64), "bilinear")
    expected = (enlarged - enlarged.min()) / (enlarged.max() - enlarged.min())
    np.testing.assert_allclose(explanation.heatmap, expected, atol=1e-4)


def test_the_heatmap_has_its_maximum_where_the_evidence_is():
    # A network that measures brightness: its convolutions average, its blocks do nothing (layer scale 0), and its
    # first label stands for bright.
    config = PoolFormerConfig(
        depths=(1, 1), hidden_sizes=(2, 2), patch_sizes=(7, 3), strides=(4, 4), padding=(2, 1), num_labels=2,
        token_mixers=("pooling",) * 2, position_embeddings=(False,) * 2,
    )  # fmt: skip
    _, variables = random_variables(config)
    variables = jax.tree.map(jnp.zeros_like, variables)
    params = variables["params"]
    params["stem"]["conv"]["kernel"] = jnp.zeros((7, 7, 3, 2)).at[..., 0].set(1 / 147)
    params["stages_1"]["downsample"]["conv"]["kernel"] = jnp.zeros((3, 3, 2, 2)).at[:, :, 0, 0].set(1 / 9)
    params["norm"]["scale"] = jnp.ones(2)
    params["head"]["kernel"] = jnp.array([[1.0, -1.0], [0.0, 0.0]])
    as_it_is = PoolFormerImageProcessor(do_resize=False, do_center_crop=False, do_normalize=False)
    explain = GradCam(config, variables, as_it_is)
    for row, column in ((0, 0), (0, 2), (2, 1), (3, 3)):
        picture = np.zeros((64, 64, 3), np.uint8)
        picture[16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 255
        explanation = explain(picture, label=0)
        y, x = np.unravel_index(explanation.heatmap.argmax(), (64, 64))
        assert (y // 16, x // 16) == (row, column)
        assert explanation.heatmap.max() == pytest.approx(1, abs=1e-6)
        assert explanation.heatmap.min() == 0


def test_the_overlay_mixes_picture_and_colours():
    np.testing.assert_allclose(jet(np.float32([0, 0.5, 1])), [[0, 0, 0.5], [0.5, 1, 0.5], [0.5, 0, 0]])
    picture = np.zeros((1, 2, 3), np.uint8)
    picture[0, 1] = 255
    overlay = Explanation(0, 1.0, picture, np.float32([[1, 0]])).overlay()
    # Half each, then stretched so that the brightest sample is 255: (0.5, 0, 0) and (1, 1, 1.5) over 1.5.
    assert overlay.tolist() == [[[85, 0, 0], [170, 170, 255]]]
    assert Explanation(0, 1.0, picture, np.float32([[1, 0]])).overlay(3).shape == (3, 6, 3)
    grey = Explanation(0, 1.0, np.zeros((2, 2, 1), np.uint8), np.zeros((2, 2), np.float32))
    assert grey.overlay().shape == (2, 2, 3)


def test_a_class_can_be_chosen_and_must_exist():
    config = PoolFormerConfig(**TINY)
    _, variables = random_variables(config)
    cam = GradCam(config, variables, PROCESSOR)
    first, second = cam(PHOTOGRAPH, 2), cam(PHOTOGRAPH, 5)
    assert (first.label, second.label) == (2, 5)
    assert not np.array_equal(first.heatmap, second.heatmap)
    cam._params = jax.tree.map(lambda leaf: leaf * np.nan, cam._params)
    with pytest.raises(ValueError, match=r"no numbers\. Expected finite weights"):
        cam(PHOTOGRAPH)
    with pytest.raises(ValueError, match=r"label=7\. Expected an index from 0 to 6"):
        cam(PHOTOGRAPH, 7)
    with pytest.raises(ValueError, match="no head"):
        GradCam(PoolFormerConfig(num_labels=0), variables, PROCESSOR)
    for regression in ({"problem_type": "regression"}, {"num_labels": 1}):
        with pytest.raises(ValueError, match="is a regression, which has no probabilities"):
            GradCam(dataclasses.replace(config, **regression), variables, PROCESSOR)


def test_from_pretrained_takes_the_saved_network_and_preprocessing(tmp_path):
    model, variables = random_variables(TWO_STAGES)
    save_pretrained(tmp_path, model, variables, image_processor=PROCESSOR)
    cam = GradCam.from_pretrained(tmp_path)
    assert (cam.config, cam.image_processor) == (TWO_STAGES, PROCESSOR)

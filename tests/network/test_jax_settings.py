"""The network and its classifier work in programs that have set jax to be strict, or to 64 bits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poolformer_jax import (
    ImageClassifier,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    load_pretrained,
    save_pretrained,
)
from poolformer_jax.inference.folding import fold
from poolformer_jax.inference.grad_cam import GradCam
from poolformer_jax.inference.jax_operations import folded_apply
from small_networks import CONFIG, EVERY_MIXER, MODEL, PHOTOGRAPHS, PROCESSOR, TINY, VARIABLES

PIXELS, LABELS = jnp.zeros((2, 64, 64, 3)), jnp.array([0, 1])
MIXERS = PoolFormerConfig(
    **TINY, token_mixers=EVERY_MIXER, position_embeddings=(False, True, False, False), image_size=64
)
networks = pytest.mark.parametrize(
    ("config", "options"),
    [
        (PoolFormerConfig(**TINY), {"dtype": jnp.bfloat16}),
        (MIXERS, {"fused": False}),
        (PoolFormerConfig(**TINY | {"num_labels": 0}, norm="layer_norm"), {"dtype": jnp.bfloat16}),
    ],
    ids=["fused", "every mixer", "without a head"],
)


@networks
@pytest.mark.parametrize(
    "setting",
    [
        partial(jax.numpy_dtype_promotion, "strict"),
        partial(jax.numpy_rank_promotion, "raise"),
        jax.checking_leaks,
        partial(jax.enable_x64, True),
    ],
    ids=["types", "ranks", "leaks", "64 bits"],
)
def test_the_network_and_its_gradients_compute(setting, config, options):
    model = PoolFormerForImageClassification(config, **options)

    def mean(variables):
        output = model.apply(variables, PIXELS, LABELS if config.num_labels else None, train=True, rngs=rngs)
        return output.logits.mean() if output.loss is None else output.loss

    with setting():
        rngs = {"dropout": jax.random.key(1)}
        variables = jax.eval_shape(model.init, jax.random.key(0), PIXELS)
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
        gradients = jax.eval_shape(jax.grad(mean), variables)
        assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {np.dtype(np.float32)}
        folded = jax.tree.map(
            jnp.asarray, fold(config, jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), variables))
        )
        logits = jax.eval_shape(partial(folded_apply, config), folded, PIXELS)
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize(
    "setting",
    [
        partial(jax.numpy_rank_promotion, "raise"),
        partial(jax.transfer_guard, "disallow"),
        partial(jax.enable_x64, True),
    ],
    ids=["ranks", "transfers", "64 bits"],
)
def test_inference_from_files_computes_the_same(setting, tmp_path):
    save_pretrained(tmp_path / "model", MODEL, VARIABLES, image_processor=PROCESSOR)
    expected = ImageClassifier(CONFIG, VARIABLES, PROCESSOR)(PHOTOGRAPHS)
    explained = GradCam(CONFIG, VARIABLES, PROCESSOR)(PHOTOGRAPHS[0])
    with setting():
        _, variables = load_pretrained(tmp_path / "model")
        found = ImageClassifier.from_pretrained(tmp_path / "model")(PHOTOGRAPHS)
        explanation = GradCam(CONFIG, variables, PROCESSOR)(PHOTOGRAPHS[0])
    for ours, theirs in zip(found, expected, strict=True):
        assert [prediction.label for prediction in ours] == [prediction.label for prediction in theirs]
        np.testing.assert_allclose([p.probability for p in ours], [p.probability for p in theirs], rtol=1e-5)
    assert explanation.label == explained.label
    np.testing.assert_allclose(explanation.heatmap, explained.heatmap, atol=1e-5)

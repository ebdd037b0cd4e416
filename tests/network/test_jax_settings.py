"""The network and its classifier work in programs that have set jax to be strict, or to 64 bits."""

import dataclasses
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from network import family_weights
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
from small_networks import (
    CONFIG,
    EVERY_MIXER,
    MODEL,
    PHOTOGRAPHS,
    PROCESSOR,
    TINY,
    TWO_STAGE_CAFORMER,
    TWO_STAGES,
    VARIABLES,
)

PIXELS, LABELS = jnp.zeros((2, 64, 64, 3)), jnp.array([0, 1])
MIXERS = PoolFormerConfig(
    **TINY | {"depths": (1, 1, 1, 1)},
    token_mixers=EVERY_MIXER,
    position_embeddings=(False, True, False, False),
    image_size=64,
)


@contextmanager
def checking_leaks() -> Iterator[None]:
    """`jax.checking_leaks`, which collects garbage after every trace: here only among what the block makes."""
    gc.freeze()
    try:
        with jax.checking_leaks():
            yield
    finally:
        gc.unfreeze()


SETTINGS = {
    "types": partial(jax.numpy_dtype_promotion, "strict"),
    "ranks": partial(jax.numpy_rank_promotion, "raise"),
    "leaks": checking_leaks,
    "64 bits": partial(jax.enable_x64, True),
}
NETWORKS = {
    "fused": (TWO_STAGES, {"dtype": jnp.bfloat16}),
    "every mixer": (MIXERS, {"fused": False}),
    "CAFormer": (TWO_STAGE_CAFORMER, {"dtype": jnp.bfloat16}),
    "RandFormer": (family_weights.config("timm", "randformer_tiny"), {"fused": False}),
    "without a head": (dataclasses.replace(TWO_STAGES, num_labels=0, norm="layer_norm"), {"dtype": jnp.bfloat16}),
}


@pytest.mark.parametrize(
    ("network", "setting"),
    [
        ("fused", "types"),
        ("fused", "leaks"),
        ("RandFormer", "types"),
        *(
            pytest.param(network, setting, marks=pytest.mark.slow)
            for network, setting in (
                ("fused", "ranks"),
                ("fused", "64 bits"),
                *(("every mixer", setting) for setting in SETTINGS),
                *(("CAFormer", setting) for setting in SETTINGS),
                ("without a head", "types"),
            )
        ),
    ],
)
def test_the_network_and_its_gradients_compute(network, setting):
    config, options = NETWORKS[network]
    model = PoolFormerForImageClassification(config, **options)

    def mean(variables):
        output = model.apply(variables, PIXELS, LABELS if config.num_labels else None, train=True, rngs=rngs)
        return output.logits.mean() if output.loss is None else output.loss

    with SETTINGS[setting]():
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


@cache
def inference():
    return ImageClassifier(CONFIG, VARIABLES, PROCESSOR)(PHOTOGRAPHS), GradCam(CONFIG, VARIABLES, PROCESSOR)(
        PHOTOGRAPHS[0]
    )


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param(partial(jax.numpy_rank_promotion, "raise"), id="ranks", marks=pytest.mark.slow),
        pytest.param(partial(jax.transfer_guard, "disallow"), id="transfers"),
        pytest.param(partial(jax.enable_x64, True), id="64 bits", marks=pytest.mark.slow),
    ],
)
def test_inference_from_files_computes_the_same(setting, tmp_path):
    save_pretrained(tmp_path / "model", MODEL, VARIABLES, image_processor=PROCESSOR)
    expected, explained = inference()
    with setting():
        _, variables = load_pretrained(tmp_path / "model")
        found = ImageClassifier.from_pretrained(tmp_path / "model")(PHOTOGRAPHS)
        explanation = GradCam(CONFIG, variables, PROCESSOR)(PHOTOGRAPHS[0])
    for ours, theirs in zip(found, expected, strict=True):
        assert [prediction.label for prediction in ours] == [prediction.label for prediction in theirs]
        np.testing.assert_allclose([p.probability for p in ours], [p.probability for p in theirs], rtol=1e-5)
    assert explanation.label == explained.label
    np.testing.assert_allclose(explanation.heatmap, explained.heatmap, atol=1e-5)

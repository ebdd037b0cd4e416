"""The folded network is the same function: same logits and feature maps, for every architecture."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from network import family_weights
from network.family_weights import KINDS
from poolformer_jax import PoolFormerConfig, PoolFormerForImageClassification, WeightsMismatch
from poolformer_jax.inference.folding import fold, fold_tree
from poolformer_jax.inference.jax_operations import folded_apply, folded_features
from poolformer_jax.network import merge_collections
from selection import slow_after
from small_networks import CONFIG, EVERY_MIXER, TINY, TWO_STAGES, VARIABLES, random_variables


@partial(jax.jit, static_argnums=(0, 3))
def apply_folded(config, folded, pixels, dtype=jnp.float32):
    return folded_apply(config, folded, pixels, dtype), folded_features(config, folded, pixels, dtype)


def assert_same_function(config, size, batch=2, tolerance=1e-5):
    height, width = (size, size) if isinstance(size, int) else size
    model, variables = random_variables(config)
    pixels = jax.random.normal(jax.random.key(1), (batch, height, width, config.num_channels))
    expected = jax.jit(model.apply)(variables, pixels)
    logits, features = apply_folded(config, fold(config, variables), pixels)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected.logits, rtol=0, atol=tolerance * float(jnp.abs(expected.logits).max()))
    for found, wanted in zip(features, expected.hidden_states, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * float(jnp.abs(wanted).max()))


# s24 and s36 have the widths of s12, m48 has those of m36; only the number of blocks differs.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["s12", "m36"])
def test_folding_keeps_logits_and_maps_of_every_published_width(name):
    assert_same_function(PoolFormerConfig.from_variant(name, depths=(1, 1, 2, 1), num_labels=50), 64)


@pytest.mark.parametrize("norm", ["group_norm", "layer_norm"])
def test_folding_keeps_logits_and_maps_with_every_token_mixer(norm):
    positions = (False, False, True, False)
    config = PoolFormerConfig(**TINY, token_mixers=EVERY_MIXER, norm=norm, position_embeddings=positions, image_size=64)
    assert_same_function(config, 64)


@pytest.mark.parametrize(
    "changes",
    [
        {"head_order": "pool_norm"},
        pytest.param({"head_order": "pool_norm", "num_labels": 0}, marks=pytest.mark.slow),
        {"num_labels": 0, "use_layer_scale": False},
        {"num_channels": 1, "mlp_ratio": 2.0, "pool_size": 5, "hidden_act": "relu"},
    ],
    ids=str,
)
def test_folding_keeps_logits_and_maps_with_every_setting(changes):
    assert_same_function(PoolFormerConfig(**{**TINY, **changes}), 64)


@pytest.mark.slow
def test_a_single_image_has_the_features_it_has_in_a_batch():
    """Its last feature maps have fewer positions than channels, so that their convolutions become matrix products."""
    config = PoolFormerConfig.from_variant("s12", depths=(1, 1, 1, 1))
    folded = fold(config, random_variables(config)[1])
    pixels = jax.random.normal(jax.random.key(1), (200, 64, 64, 3))
    text = [apply_folded.lower(config, folded, images).as_text() for images in (pixels, pixels[:1])]
    assert [one.count("stablehlo.convolution") for one in text] == [8, 2]  # in logits and in features
    _, together = apply_folded(config, folded, pixels)
    _, alone = apply_folded(config, folded, pixels[:1])
    for one, many in zip(alone, together, strict=True):
        np.testing.assert_allclose(one[0], many[0], rtol=0, atol=1e-5 * float(jnp.abs(many).max()))


def test_folding_keeps_logits_and_maps_of_images_that_are_not_square():
    assert_same_function(TWO_STAGES, (65, 97))


def test_folding_is_exact_in_float64():
    # In float64 only the rounding of the folded parameters to float32 is left.
    with jax.enable_x64(True):
        config = PoolFormerConfig(**TINY)
        _, variables = random_variables(config)
        pixels = jax.random.normal(jax.random.key(1), (1, 64, 64, 3), jnp.float64)
        expected = jax.jit(PoolFormerForImageClassification(config, dtype=jnp.float64).apply)(variables, pixels).logits
        logits, _ = apply_folded(config, fold(config, variables), pixels, jnp.float64)
    assert logits.dtype == jnp.float64
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-7 * np.abs(expected).max())


@pytest.mark.slow
def test_folding_in_bfloat16_is_as_close_to_float32_as_the_model_in_bfloat16():
    config = PoolFormerConfig(**TINY)
    model, variables = random_variables(config)
    pixels = jax.random.normal(jax.random.key(1), (4, 64, 64, 3))
    exact = jax.jit(model.apply)(variables, pixels).logits
    rounded = PoolFormerForImageClassification(config, dtype=jnp.bfloat16)
    unfolded = jax.jit(rounded.apply)(variables, pixels).logits
    folded, features = apply_folded(config, fold(config, variables), pixels, jnp.bfloat16)
    assert all(feature.dtype == jnp.bfloat16 for feature in features)
    assert jnp.abs(folded - exact).mean() <= 1.5 * jnp.abs(unfolded - exact).mean()


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (1, 16, 64, 3), (64, 64, 3)], ids=str)
def test_the_folded_network_refuses_pixels_with_the_models_message(shape):
    config = PoolFormerConfig(**TINY)
    model, variables = random_variables(config)
    messages = []
    for apply in (lambda x: model.apply(variables, x), lambda x: folded_apply(config, fold(config, variables), x)):
        with pytest.raises(ValueError, match=r"pixel_values has shape") as error:
            apply(jnp.zeros(shape))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("images_at_once", [None, 4])
def test_an_empty_batch_has_no_logits(images_at_once):
    config = PoolFormerConfig(**TINY, token_mixers=EVERY_MIXER, image_size=64)
    folded = fold(config, random_variables(config)[1])
    apply = partial(folded_apply, config, images_at_once=images_at_once)
    logits = jax.eval_shape(apply, folded, jnp.zeros((0, 64, 64, 3)))
    assert logits.shape == (0, config.num_labels)


def test_the_folded_network_is_smaller():
    config = PoolFormerConfig(**TINY)
    _, variables = random_variables(config)
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    # Per block: norm1 and norm2 (2c each), both layer scales (c each) become one vector; and the final norm.
    blocks = [channels for channels, depth in zip(config.hidden_sizes, config.depths) for _ in range(depth)]
    assert count(variables) - count(fold(config, variables)) == 5 * sum(blocks) + 2 * config.hidden_sizes[-1]


def test_logits_do_not_depend_on_the_number_of_images_at_once():
    folded = fold(TWO_STAGES, random_variables(TWO_STAGES)[1])
    pixels = jnp.asarray(np.random.default_rng(0).normal(size=(6, 32, 32, 3)), jnp.float32)
    apply = jax.jit(folded_apply, static_argnums=0, static_argnames="images_at_once")
    whole = apply(TWO_STAGES, folded, pixels)
    for images_at_once in (1, 4, 8):  # 4 does not divide the batch, so 3 are computed at a time
        parts = apply(TWO_STAGES, folded, pixels, images_at_once=images_at_once)
        np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-6 * np.abs(whole).max())


PER_STAGE = [name for name, value in vars(CONFIG).items() if isinstance(value, tuple)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_labels": 3}, r"head/kernel \[16, 7\], expected \[16, 3\]"),
        ({"depths": (1, 1, 1, 2)}, "missing: stages_3/blocks_1/"),
        ({name: getattr(CONFIG, name)[:3] for name in PER_STAGE}, "unexpected: stages_3/"),
    ],
)
def test_folding_refuses_weights_of_another_network(changes, message):
    config = dataclasses.replace(CONFIG, id2label=None, **changes)
    with pytest.raises(WeightsMismatch, match=message):
        fold(config, VARIABLES)


def test_folding_refuses_a_tree_without_its_collection():
    with pytest.raises(ValueError, match=r"Expected {'params': tree}"):
        fold(CONFIG, VARIABLES["params"])


@pytest.mark.parametrize(
    ("kind", "labels"), slow_after(2, [*((kind, 10) for kind in reversed(KINDS)), ("caformer", 0)])
)
def test_folding_is_exact_for_every_kind_of_the_second_paper(kind, labels):
    config = family_weights.config("sail", f"{kind}_tiny", num_labels=labels)
    with jax.enable_x64():
        variables = family_weights.variables("sail", config, "float64")
        pixels = jax.random.normal(jax.random.key(1), (2, 64, 64, 3), "float64")
        model = PoolFormerForImageClassification(config, "float64")
        expected = jax.jit(model.apply)(variables, pixels)
        folded = fold_tree(config, merge_collections(variables))
        logits, features = apply_folded(config, folded, pixels, "float64")
    for found, wanted in zip((logits, *features), (expected.logits, *expected.hidden_states), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12 * float(np.abs(wanted).max()))

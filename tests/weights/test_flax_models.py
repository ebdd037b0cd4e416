"""The models with parameters do what FlaxPreTrainedModel of transformers 4 did, with the linen modules' results."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paths import TESTS
from poolformer_jax import (
    FlaxPoolFormerForImageClassification,
    FlaxPoolFormerModel,
    MetaFormerConfig,
    PoolFormerConfig,
    PoolFormerImageProcessor,
    WeightsMismatch,
    load_pretrained,
)
from small_networks import TWO_STAGES, random_variables

FIXTURES = TESTS / "fixtures"
CONFIG = dataclasses.replace(TWO_STAGES, id2label={0: "a", 1: "b", 2: "c", 3: "d", 4: "e"})
PARAMS = random_variables(CONFIG)[1]["params"]
PIXELS = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    model = FlaxPoolFormerForImageClassification(CONFIG, _do_init=False)
    model.params = PARAMS
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder


def test_a_call_gives_the_modules_output(model):
    expected = jax.jit(model.module.apply)({"params": PARAMS}, PIXELS, labels=np.array([1, 4]))
    output = model(PIXELS, labels=np.array([1, 4]), output_hidden_states=True)
    for name in expected:
        jax.tree.map(assert_close, output[name], expected[name])
    assert list(model(PIXELS)) == ["logits"]
    loss, logits = model(pixel_values=PIXELS, labels=np.array([1, 4]), return_dict=False)
    assert (loss, logits.shape) == (output.loss, (2, 5))


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_defaults_of_the_output_are_the_configs(model):
    config = dataclasses.replace(CONFIG, output_hidden_states=True, return_dict=False)
    other = FlaxPoolFormerForImageClassification(config, _do_init=False)
    logits, maps = other(PIXELS, PARAMS)
    assert_close(logits, model(PIXELS).logits)
    assert [feature_map.shape for feature_map in maps] == [(2, 8, 8, 8), (2, 4, 4, 12)]


def test_the_dropout_key_decides_in_training_only(model):
    config = dataclasses.replace(CONFIG, drop_path_rate=0.5)
    dropping = FlaxPoolFormerForImageClassification(config, _do_init=False)
    calls = [dropping(PIXELS, PARAMS, jax.random.key(key), train=True).logits for key in (0, 0, 1, 2, 3)]
    np.testing.assert_array_equal(calls[0], calls[1])
    assert any(np.abs(call - calls[0]).max() > 1e-3 for call in calls[2:])
    assert_close(dropping(PIXELS, PARAMS, jax.random.key(0)).logits, model(PIXELS).logits)


def test_random_parameters_are_the_modules_and_keep_given_ones():
    model = FlaxPoolFormerModel(TWO_STAGES, seed=3)
    expected = jax.jit(model.module.init)(jax.random.key(3), PIXELS)["params"]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), model.params, expected)
    kept = model.init_weights(jax.random.key(4), (1, 32, 32, 3), {"stem": PARAMS["stem"]})
    np.testing.assert_array_equal(kept["stem"]["conv"]["kernel"], PARAMS["stem"]["conv"]["kernel"])
    assert jax.tree.structure(kept) == jax.tree.structure(expected)


def test_a_saved_model_is_loaded(folder, model):
    loaded = FlaxPoolFormerForImageClassification.from_pretrained(folder, from_pt=True, drop_path_rate=0.1)
    assert loaded.config == dataclasses.replace(CONFIG, drop_path_rate=0.1)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, dict(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(folder)[1]["params"], dict(PARAMS))
    without, params = FlaxPoolFormerForImageClassification.from_pretrained(folder, _do_init=False, dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match=r"no parameters, because of _do_init=False"):
        without(PIXELS)
    assert without(PIXELS, params, output_hidden_states=True).hidden_states[0].dtype == jnp.bfloat16


def test_another_number_of_classes_needs_permission_for_a_new_head(folder):
    load = FlaxPoolFormerForImageClassification.from_pretrained
    with pytest.raises(ValueError, match=r"head/kernel \[12, 5\] instead of \[12, 2\]\). Pass ignore_mismatched_sizes"):
        load(folder, id2label=["cat", "dog"])
    with pytest.warns(UserWarning, match=r"The head is new.*head/bias \[5\] instead of \[2\], head/kernel"):
        model = load(folder, id2label=["cat", "dog"], label2id={"cat": 0, "dog": 1}, ignore_mismatched_sizes=True)
    assert (model.config.num_labels, model.config.id2label) == (2, {0: "cat", 1: "dog"})
    assert model(PIXELS).logits.shape == (2, 2)
    np.testing.assert_array_equal(model.params["norm"]["scale"], PARAMS["norm"]["scale"])


def test_a_backbone_is_loaded_from_a_classifier_and_saved_alone(folder, tmp_path):
    backbone = FlaxPoolFormerModel.from_pretrained(folder)
    assert "head" not in backbone.params and "norm" not in backbone.params
    backbone.save_pretrained(tmp_path / "alone", metrics={"mAP": 0.5})
    assert "| mAP | 0.5 |" in (tmp_path / "alone" / "README.md").read_text()
    assert json.loads((tmp_path / "alone" / "config.json").read_text())["architectures"] == ["PoolFormerModel"]
    again = FlaxPoolFormerModel.from_pretrained(tmp_path / "alone")
    jax.tree.map(np.testing.assert_array_equal, again.params, backbone.params)
    (last,) = again(PIXELS, return_dict=False)
    assert last.shape == (2, 4, 4, 12)
    with pytest.warns(UserWarning, match="head and norm are new and must be trained"):
        classifier = FlaxPoolFormerForImageClassification.from_pretrained(tmp_path / "alone")
    assert_close(classifier(PIXELS, output_hidden_states=True).hidden_states[-1], last)


def test_a_model_shows_its_network():
    config = PoolFormerConfig.from_variant("s12")
    assert repr(FlaxPoolFormerModel(config, _do_init=False)) == "FlaxPoolFormerModel(s12, 1000 labels)"
    assert repr(FlaxPoolFormerForImageClassification(CONFIG, _do_init=False)).endswith("(8, 12), 5 labels)")


def test_weights_of_pytorch_are_loaded():
    model = FlaxPoolFormerForImageClassification.from_pretrained(FIXTURES / "hf_sharded", from_pt=True)
    assert model.config.id2label[2] == "axolotl"


def test_parameters_of_another_network_are_refused(model):
    with pytest.raises(WeightsMismatch, match="unexpected: head/bias"):
        FlaxPoolFormerModel(CONFIG, _do_init=False).params = PARAMS


def test_parameters_are_cast_where_the_mask_says_so(model):
    half = model.to_bf16(model.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(model.to_fp32(half))} == {jnp.dtype(jnp.float32)}
    mask = jax.tree.map(lambda _: False, model.params) | {"head": {"kernel": True, "bias": False}}
    some = model.to_fp16(model.params, mask)
    assert (some["head"]["kernel"].dtype, some["head"]["bias"].dtype) == (jnp.float16, jnp.float32)
    assert model(PIXELS, half).logits.dtype == jnp.float32


def test_a_model_is_uploaded_as_it_is_saved(model, monkeypatch, tmp_path):
    uploads = []

    def push_to_hub(name, save, **options):
        save(tmp_path / "uploaded")
        uploads.append((name, options))
        return "address"

    monkeypatch.setattr("poolformer_jax.hub.push_to_hub", push_to_hub)
    assert model.push_to_hub("me/model", private=True) == "address"
    model.save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert uploads == [("me/model", {"private": True}), ("mine", {})]
    assert PoolFormerConfig.from_pretrained(tmp_path / "uploaded") == CONFIG


def test_a_loaded_model_is_saved_with_its_preprocessing(model, tmp_path):
    processor = PoolFormerImageProcessor(crop_pct=0.5)
    model.save_pretrained(tmp_path / "loaded", image_processor=processor)
    FlaxPoolFormerForImageClassification.from_pretrained(tmp_path / "loaded").save_pretrained(tmp_path / "saved")
    assert PoolFormerImageProcessor.from_pretrained(tmp_path / "saved") == processor


def test_a_config_says_what_the_arrays_do_not_and_may_have_other_classes(tmp_path):
    config = MetaFormerConfig.from_variant("identityformer_s12", depths=(1, 1, 1, 1), hidden_sizes=(4, 4, 8, 8))
    FlaxPoolFormerForImageClassification(config).save_pretrained(tmp_path / "model", layout="sail")
    weights = tmp_path / "model" / "model.pth.tar"
    other = dataclasses.replace(config, num_labels=2)
    with pytest.warns(UserWarning, match="head is new"):
        model = FlaxPoolFormerForImageClassification.from_pretrained(
            weights.rename(tmp_path / "weights.pth"), config=other, torch_dtype="bfloat16", ignore_mismatched_sizes=True
        )
    assert (model.config, model.dtype) == (other, jnp.bfloat16)

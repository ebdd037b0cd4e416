"""Models are loaded from folders and files of every layout, with the config beside the weights."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden.fixture_values import parameter
from paths import TESTS
from poolformer_jax import (
    FlaxPoolFormerModel,
    MetaFormerConfig,
    PoolFormerConfig,
    WeightsFileError,
    WeightsMismatch,
    load_pretrained,
)
from poolformer_jax.weights import build_model, open_model, open_weights, transfer
from saved_models import CONFIG, LABELS, PROCESSOR, make_variables, same, save

FIXTURES = TESTS / "fixtures"


def test_the_loaded_model_computes(tmp_path):
    save(tmp_path / "model")
    model, variables = load_pretrained(tmp_path / "model", dtype=jnp.bfloat16)
    output = jax.jit(model.apply)(variables, np.ones((2, 64, 64, 3), np.float32))
    assert output.logits.shape == (2, 3)
    assert output.hidden_states[0].dtype == jnp.bfloat16
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize("file", ["hf.bin", "hf_sharded", "timm_checkpoint.pth.tar", "sail_checkpoint_legacy.pth.tar"])
def test_files_and_folders_are_loaded(file):
    model, variables = load_pretrained(FIXTURES / file)
    assert (model.config.depths, model.config.num_labels) == ((1, 1, 2, 1), 3)
    assert model.config.head_order == ("pool_norm" if "timm" in file else "norm_pool")
    assert model.config.id2label == (LABELS if file == "hf_sharded" else None)
    assert variables["params"]["head"]["kernel"].shape == (8, 3)


def test_the_moving_average_is_loaded_on_request():
    _, variables = load_pretrained(FIXTURES / "timm_checkpoint.pth.tar", use_ema=True)
    np.testing.assert_array_equal(variables["params"]["head"]["bias"], parameter("ema.head.fc.bias", (3,)))


def test_opening_matches_the_names_once_and_finds_labels_and_preprocessing(tmp_path, monkeypatch):
    save(tmp_path / "model", image_processor=PROCESSOR)
    matches = []
    match_names = transfer.match_names
    monkeypatch.setattr(transfer, "match_names", lambda shapes: matches.append(1) or match_names(shapes))
    opened = open_model(tmp_path / "model")
    assert (opened.config, opened.labels, opened.image_processor) == (CONFIG, LABELS, PROCESSOR)
    assert same(build_model(opened)[1], make_variables(CONFIG))
    assert len(matches) == 1


def test_our_safetensors_file_contains_its_config(tmp_path):
    config = dataclasses.replace(CONFIG, token_mixers=("identity",) * 4, norm="layer_norm", head_order="pool_norm")
    save(tmp_path / "model", config=config)
    shutil.copy(tmp_path / "model" / "flax_model.safetensors", tmp_path / "alone.safetensors")
    assert "poolformer_jax.config" in open_weights(tmp_path / "alone.safetensors").metadata  # part of the file format
    model, _ = load_pretrained(tmp_path / "alone.safetensors")
    assert model.config == config


TIMM_CONFIG = {
    "architecture": "poolformer_s12",
    "num_classes": 3,
    "pretrained_cfg": {"input_size": [3, 224, 224], "crop_pct": 0.9, "interpolation": "bicubic"},
}


@pytest.mark.parametrize(
    ("entries", "labels"),
    [
        ({}, None),
        ({"label_names": ["cat", "dog", "axolotl"]}, LABELS),
        ({"label_names": {"0": "n1", "1": "n2", "2": "n3"}, "label_descriptions": {"n1": "cat", "n2": "dog"}},
         {0: "cat", 1: "dog", 2: "n3"}),
        ({"label_names": ["a", "b"]}, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("layout", ["timm", "sail"])
def test_timms_config_gives_labels_and_head_order_for_any_layout(tmp_path, layout, entries, labels):
    if layout == "timm":
        shutil.copy(FIXTURES / "timm_float16.pth", tmp_path / "pytorch_model.bin")
    else:
        save(tmp_path, layout)
    (tmp_path / "config.json").write_text(json.dumps(TIMM_CONFIG | entries))
    model, _ = load_pretrained(tmp_path)
    assert (model.config.head_order, model.config.id2label) == ("pool_norm", labels)


@pytest.mark.parametrize("layout", ["jax", "hf", "sail"])
def test_a_saved_multi_label_network_stays_one(tmp_path, layout):
    save(tmp_path / "model", layout, dataclasses.replace(CONFIG, problem_type="multi_label_classification"))
    assert load_pretrained(tmp_path / "model")[0].config.problem_type == "multi_label_classification"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"global_pool": "max"}, "global_pool='max': expected 'avg'"),
        ({"num_classes": 5}, "num_classes=5: expected 3"),
        ({"architecture": "resnet50"}, "architecture='resnet50': expected poolformer_s12 or "),
        ({"model_args": {"global_pool": "max"}}, "global_pool='max': expected 'avg'"),
        ({"model_args": {"token_mixers": "attention"}}, "token_mixers='attention': expected no such entry"),
        ({"model_args": {"depths": [1, 1, 1, 1]}}, r"depths=\[1, 1, 1, 1\]: expected \[1, 1, 2, 1\]"),
    ],
)
def test_timms_config_of_another_model_is_refused(tmp_path, entries, message):
    shutil.copy(FIXTURES / "timm_float16.pth", tmp_path / "pytorch_model.bin")
    right = {"in_chans": 3, "depths": [1, 1, 2, 1], "dims": [2, 4, 6, 8], "drop_path_rate": 0.1}
    (tmp_path / "config.json").write_text(json.dumps(TIMM_CONFIG | {"global_pool": "avg", "model_args": right}))
    load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TIMM_CONFIG | entries))
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def test_timms_config_of_another_size_is_refused(tmp_path):
    config = PoolFormerConfig.from_variant("s12", num_labels=3, head_order="pool_norm")
    save(tmp_path / "model", "timm", config)
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(written | {"architecture": "poolformer_m48"}))
    with pytest.raises(ValueError, match="architecture='poolformer_m48': expected poolformer_s12"):
        load_pretrained(tmp_path / "model")


@pytest.mark.parametrize("text", ["{}", '{"lr": 0.1, "optimizer": {"name": "adamw"}}'])
def test_a_config_json_of_another_program_is_ignored(tmp_path, text):
    shutil.copy(FIXTURES / "hf.bin", tmp_path / "best.pth")
    (tmp_path / "config.json").write_text(text)
    assert load_pretrained(tmp_path / "best.pth")[0].config == load_pretrained(FIXTURES / "hf.bin")[0].config
    (tmp_path / "config.json").write_text('{"depths": [1, 1, 2, 1]}')
    with pytest.raises(ValueError, match="Expected model_type 'poolformer'"):
        load_pretrained(tmp_path / "best.pth")


def test_a_config_without_labels_takes_their_number_from_the_weights(tmp_path):
    shutil.copytree(FIXTURES / "hf_sharded", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["id2label"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    model, _ = load_pretrained(tmp_path / "model")
    assert (model.config.num_labels, model.config.id2label) == (3, None)


def test_safetensors_are_preferred_and_an_ambiguous_folder_is_refused(tmp_path):
    save(tmp_path / "model")
    shutil.copy(FIXTURES / "whole_model.bin", tmp_path / "model" / "pytorch_model.bin")
    load_pretrained(tmp_path / "model")
    folder = tmp_path / "several"
    folder.mkdir()
    shutil.copy(FIXTURES / "hf.bin", folder / "first.bin")
    load_pretrained(folder)
    shutil.copy(FIXTURES / "hf.bin", folder / "second.bin")
    with pytest.raises(ValueError, match=r"several weights files: first.bin, second.bin. Give the path of one"):
        load_pretrained(folder)


def test_a_config_is_utf_8_with_or_without_a_byte_order_mark(tmp_path):
    shutil.copytree(FIXTURES / "hf_sharded", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    entries = {**json.loads(config.read_text()), "id2label": {"0": "café", "1": "b", "2": "c"}}
    text = json.dumps(entries, ensure_ascii=False)
    for encoding in ("utf-8", "utf-8-sig"):
        config.write_text(text, encoding)
        assert load_pretrained(tmp_path / "model")[0].config.id2label[0] == "café"
    config.write_text(text, "latin-1")
    with pytest.raises(ValueError, match=r"is not JSON.*decode"):
        load_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is a list. Expected an object"),
        ('{"model_type": "vit"}', "describes a 'vit' model"),
        ('{"model_type": "poolformer", "depths": 3}', "malformed"),
        ('{"model_type": "poolformer", "id2label": [1]}', "malformed"),
        ('{"model_type": "poolformer", "depths": [1000000000, 1, 1, 1], "num_labels": 3}', "at most 10,000 blocks"),
        ('{"architecture": "poolformer_s12", "pretrained_cfg": 7}', "malformed"),
        (
            '{"model_type": "poolformer", "depths": [1, 1, 3, 1], "hidden_sizes": [2, 4, 6, 8], "num_labels": 3}',
            "missing",
        ),
    ],
)
def test_a_wrong_config_is_refused(tmp_path, text, message):
    shutil.copytree(FIXTURES / "hf_sharded", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path / "model")


def test_a_damaged_file_is_named(tmp_path):
    save(tmp_path / "model")
    content = (tmp_path / "model" / "flax_model.safetensors").read_bytes()
    (tmp_path / "model" / "flax_model.safetensors").write_bytes(content[:-7])
    with pytest.raises(WeightsFileError, match=r"Cannot read the weights in .*model\.safetensors"):
        load_pretrained(tmp_path / "model")


def test_a_loaded_network_takes_changes_of_its_config_that_leave_the_parameters(tmp_path):
    save(tmp_path / "model")
    model, _ = load_pretrained(tmp_path / "model", drop_path_rate=0.1)
    assert model.config == dataclasses.replace(CONFIG, drop_path_rate=0.1)
    model, variables = load_pretrained(tmp_path / "model", id2label=["ant", "bee"], reset_head=True)
    assert model.config.id2label == {0: "ant", 1: "bee"} and variables["params"]["head"]["kernel"].shape == (8, 2)
    with pytest.raises(WeightsMismatch, match="stages_0/blocks_1"):
        load_pretrained(tmp_path / "model", depths=(2, 1, 2, 1))


def test_the_layers_of_a_new_mlp_head_start_with_different_numbers(tmp_path):
    small = {"depths": (1, 1, 1, 1), "hidden_sizes": (8, 8, 32, 32), "num_labels": 3}
    config = MetaFormerConfig.from_variant("caformer_s18", **small)
    FlaxPoolFormerModel(config).save_pretrained(tmp_path / "model")
    _, variables = load_pretrained(tmp_path / "model", num_labels=5, reset_head=True)
    first, second = (np.ravel(variables["params"]["head"][name]["kernel"]) for name in ("fc1", "fc2"))
    assert not np.isin(second, first).any()

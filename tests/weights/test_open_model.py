"""What no array shows about a network comes from names and arguments, and is never assumed in silence."""

import dataclasses
import json
import shutil
import warnings

import numpy as np
import pytest

import archives
from paths import TESTS
from poolformer_jax import ImageClassifier, PoolFormerConfig, from_torch_state_dict, load_pretrained
from poolformer_jax.hub import Repository
from poolformer_jax.images import imagenet_labels
from poolformer_jax.weights import class_names, default_image_processor, leaves, open_model, to_torch_state_dict
from saved_models import CONFIG, make_variables, same, save

NETWORK = dataclasses.replace(CONFIG, id2label=None)
ARRAYS = to_torch_state_dict(NETWORK, make_variables(NETWORK), "sail")
IDENTITY = {"token_mixers": ("identity",) * 4}
LAYER_NORM = {"norm": "layer_norm"}


def quietly(path, **options):
    """The config of a model that is opened without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return open_model(path, **options).config


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("poolformer_s12.pth.tar", {}),
        ("poolformer-s12_3rdparty_32xb128_in1k_20220414-f8d83051.pth", {}),
        ("poolformer_ln_s12.pth.tar", LAYER_NORM),
        ("PoolFormer-LN-S12-best.pth", LAYER_NORM),
        ("poolformer_s12_layernorm.pth", LAYER_NORM),
        ("poolformer_id_s12.pth.tar", IDENTITY),
        ("metaformer_id_s12.pth.tar", IDENTITY),
    ],
)
@pytest.mark.parametrize("place", ["file", "folder", "arch"])
def test_a_published_name_says_which_network_it_is(tmp_path, name, changes, place):
    path = {"file": tmp_path / name, "folder": tmp_path / name.split(".")[0] / "best.pth"}.get(
        place, tmp_path / "a.pth"
    )
    path.parent.mkdir(exist_ok=True)
    archives.checkpoint(path, {"arch": name.split(".")[0] if place == "arch" else None, "state_dict": ARRAYS})
    assert quietly(path) == dataclasses.replace(NETWORK, **changes)
    if place == "folder":
        assert quietly(path.parent) == dataclasses.replace(NETWORK, **changes)


@pytest.mark.parametrize("name", ["best.pth", "poolformer_xy_s12.pth", "poolformer.pth", "metaformer_t12.pth"])
def test_without_a_published_name_what_is_assumed_is_said(tmp_path, name):
    path = archives.checkpoint(tmp_path / name, ARRAYS)
    with pytest.warns(
        UserWarning, match=r"Assumes norm='group_norm' and token_mixers=\('pooling', .*--variant.*config="
    ):
        opened = open_model(path)
    assert opened.assumed is not None and opened.config == NETWORK
    with pytest.warns(UserWarning, match="The arrays of this state dict do not show its norm"):
        from_torch_state_dict(ARRAYS)


@pytest.mark.parametrize("file", ["hf.bin", "timm_float64.pth"])
def test_names_of_transformers_and_timm_leave_nothing_open(file):
    quietly(TESTS / "fixtures" / file)


def test_different_names_for_one_file_are_an_error(tmp_path):
    path = archives.checkpoint(tmp_path / "poolformer_ln_s12.pth", {"arch": "poolformer_s12", "state_dict": ARRAYS})
    with pytest.raises(ValueError, match=r"different networks: poolformer_s12, poolformer_ln_s12\.pth.*--variant"):
        open_model(path)
    assert quietly(path, config=NETWORK) == NETWORK


def test_batch_norm_is_named(tmp_path):
    path = archives.checkpoint(tmp_path / "poolformer_bn_s12.pth.tar", ARRAYS)
    with pytest.raises(ValueError, match=r"poolformer_bn_s12\.pth\.tar names a network with BatchNorm"):
        open_model(path)
    statistics = {f"network.0.0.norm1.running_{name}": np.ones(2, np.float32) for name in ("mean", "var")}
    with pytest.raises(ValueError, match=r"have BatchNorm \(network\.0\.0\.norm1\.running_mean\)"):
        from_torch_state_dict({**ARRAYS, **statistics})


def test_config_and_variant_say_which_network_it_is(tmp_path):
    other = dataclasses.replace(NETWORK, norm="layer_norm", hidden_act="relu")
    path = archives.checkpoint(tmp_path / "best.pth", ARRAYS)
    assert quietly(path, config=other) == other
    model, variables = load_pretrained(path, config=other)
    assert model.config == other and same(variables, make_variables(NETWORK))
    with pytest.raises(ValueError, match=r"config=\.\.\. and variant='s12' were given"):
        open_model(path, config=other, variant="s12")
    with pytest.raises(ValueError, match="There is no variant 'resnet50'"):
        open_model(path, variant="resnet50")


@pytest.mark.parametrize(
    ("variant", "changes"),
    [("s12", {}), ("poolformer_ln_s12", LAYER_NORM), ("poolformer_id_s12", IDENTITY), ("metaformer_id_s12", IDENTITY)],
)
def test_variants_include_the_authors_ablations_of_the_norm(tmp_path, variant, changes):
    config = PoolFormerConfig.from_variant("s12", num_labels=3)
    arrays = {leaf.name: np.zeros(leaf.stored_shape, np.int8).astype(np.float16) for leaf in leaves(config, "sail")}
    path = archives.checkpoint(tmp_path / "poolformer_bn_s12.pth", arrays)
    assert quietly(path, variant=variant) == dataclasses.replace(config, **changes)


def test_the_layer_norm_ablation_has_the_labels_and_preprocessing_of_its_size():
    config = PoolFormerConfig.from_variant("s12", norm="layer_norm")
    assert class_names(config) == imagenet_labels()
    assert default_image_processor(config).crop_pct == 0.9


def test_names_to_leave_out_are_suggested_and_left_out(tmp_path):
    arrays = {**{f"model.{name}": array for name, array in ARRAYS.items()}, "metric.total": ARRAYS["head.bias"]}
    path = archives.checkpoint(tmp_path / "poolformer_s12.ckpt", {"state_dict": arrays})
    with pytest.raises(
        ValueError, match=r"metric\.total \[3\]\nTo .* ignore=\['metric\.\*'\] \(--ignore 'metric\.\*'\)"
    ):
        open_model(path)
    _, variables = load_pretrained(path, ignore=["metric.*"])
    assert same(variables, make_variables(NETWORK))
    _, variables = from_torch_state_dict(arrays, ignore=("metric.*",))
    assert same(variables, make_variables(NETWORK))
    with pytest.raises(ValueError, match=r"ignore='metric\.\*' is one text. Expected a list"):
        load_pretrained(path, ignore="metric.*")


@pytest.mark.parametrize("name", ["criterion.weight", "loss.pos_weight", "train_loss.weight", "model.loss_fn.weight"])
def test_buffers_of_losses_are_left_out_with_a_warning(name):
    with pytest.warns(UserWarning, match=rf"Leaves out arrays of a loss: {name}"):
        _, variables = from_torch_state_dict({**ARRAYS, name: np.ones(3, np.float32)}, NETWORK)
    assert same(variables, make_variables(NETWORK))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://example.com/s12.pth", "https://example.com/s12.pth is an address. Addresses are not downloaded"),
        ("https://huggingface.co/sail/poolformer_s12/tree/main", "Expected the name .* 'sail/poolformer_s12'"),
        ("gs://bucket/model", "not downloaded"),
        ("./model", "There is no model at ./model"),
        ("{folder}/s21", "the folder {folder} has no s21"),
        ("models/s21", "the folder models has no s21.* pass its revision"),
    ],
)
def test_addresses_and_mistyped_paths_are_not_looked_for_on_the_hub(tmp_path, monkeypatch, source, message):
    monkeypatch.setattr(Repository, "find", lambda *_: pytest.fail("asks the Hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(FileNotFoundError, match=message.format(folder=tmp_path)):
        open_model(source.format(folder=tmp_path))


def test_a_classifier_takes_the_same_options(tmp_path):
    path = archives.checkpoint(tmp_path / "best.pth", {**ARRAYS, "version": 3})
    processor = default_image_processor(PoolFormerConfig())
    options = {
        "image_processor": processor,
        "config": dataclasses.replace(NETWORK, **LAYER_NORM),
        "ignore": ["version"],
    }
    assert ImageClassifier.from_pretrained(path, **options).config.norm == "layer_norm"


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_timms_config_says_what_the_labels_are_for(tmp_path, problem):
    shutil.copy(TESTS / "fixtures" / "timm_checkpoint.pth.tar", tmp_path / "pytorch_model.bin")
    config = {"architecture": "poolformer_s12", "model_type": "timm_wrapper", "problem_type": problem}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert quietly(tmp_path).problem_type == problem


def test_the_folder_of_a_run_names_that_of_its_model(tmp_path):
    save(tmp_path / "run" / "model")
    with pytest.raises(FileNotFoundError, match="Expected that of the model, "):
        open_model(tmp_path / "run")

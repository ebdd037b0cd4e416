"""Models come from a folder, a file or the Hub's cache, and go into folders that are whole or not there."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from golden.fixture_values import parameter
from poolformer_jax import PoolFormerConfig, PoolFormerForImageClassification, PoolFormerImageProcessor
from poolformer_jax.model_folder import write_model
from poolformer_jax.pretrained import load_pretrained, save_pretrained
from poolformer_jax.torch_weights import WeightsMismatch
from poolformer_jax.torch_weights.files import WeightsFileError, open_weights
from poolformer_jax.torch_weights.names import leaves

FIXTURES = Path(__file__).parent / "fixtures"
LABELS = {0: "cat", 1: "dog", 2: "axolotl"}
CONFIG = PoolFormerConfig(depths=(1, 1, 2, 1), hidden_sizes=(2, 4, 6, 8), num_labels=3, id2label=LABELS)
PROCESSOR = PoolFormerImageProcessor(crop_pct=0.875, image_mean=(0.5, 0.5, 0.5))


def make_variables(config):
    tree = {}
    for leaf in leaves(config):
        *parents, last = leaf.path.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = parameter(leaf.path, leaf.shape)
    return {"params": tree}


def same(first, second):
    return jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b) and a.dtype == b.dtype, first, second))


def save(folder, layout="jax", config=CONFIG, **options):
    variables = make_variables(config)
    save_pretrained(folder, PoolFormerForImageClassification(config), variables, layout, **options)
    return variables


@pytest.mark.parametrize("layout", ["jax", "hf", "sail"])
def test_what_is_saved_is_loaded_bit_for_bit_with_labels_and_preprocessing(tmp_path, layout):
    saved = save(tmp_path / "model", layout, image_processor=PROCESSOR)
    model, variables = load_pretrained(tmp_path / "model")
    assert model.config == CONFIG
    assert same(variables, saved)
    assert PoolFormerImageProcessor.from_pretrained(tmp_path / "model") == PROCESSOR
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json",
        "preprocessor_config.json",
        "model.pth.tar" if layout == "sail" else "model.safetensors",
    }


def test_a_folder_for_timm_is_loaded_with_its_labels_and_preprocessing(tmp_path):
    labels = {index: f"class {index}" for index in range(3)}
    config = PoolFormerConfig.from_variant("s12", num_labels=3, id2label=labels, head_order="pool_norm")
    saved = save(tmp_path / "model", "timm", config, image_processor=PROCESSOR)
    model, variables = load_pretrained(tmp_path / "model")
    assert model.config == config
    assert same(variables, saved)
    assert PoolFormerImageProcessor.from_pretrained(tmp_path / "model") == PROCESSOR
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (written["architecture"], written["num_classes"]) == ("poolformer_s12", 3)


def test_the_loaded_model_computes(tmp_path):
    save(tmp_path / "model")
    model, variables = load_pretrained(tmp_path / "model", dtype=jnp.bfloat16)
    output = jax.jit(model.apply)(variables, np.ones((2, 64, 64, 3), np.float32))
    assert output.logits.shape == (2, 3)
    assert output.hidden_states[0].dtype == jnp.bfloat16
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize("file", ["hf.bin", "hf_sharded", "timm_checkpoint.pth.tar", "sail_checkpoint_legacy.pth.tar"])
def test_every_kind_of_source_is_loaded(file):
    model, variables = load_pretrained(FIXTURES / file)
    assert (model.config.depths, model.config.num_labels) == ((1, 1, 2, 1), 3)
    assert model.config.head_order == ("pool_norm" if "timm" in file else "norm_pool")
    assert model.config.id2label == (LABELS if file == "hf_sharded" else None)
    assert variables["params"]["head"]["kernel"].shape == (8, 3)


def test_the_moving_average_is_loaded_on_request():
    _, variables = load_pretrained(FIXTURES / "timm_checkpoint.pth.tar", use_ema=True)
    np.testing.assert_array_equal(variables["params"]["head"]["bias"], parameter("ema.head.fc.bias", (3,)))


def test_a_lone_file_of_ours_carries_its_config(tmp_path):
    config = dataclasses.replace(CONFIG, token_mixers=("identity",) * 4, norm="layer_norm", head_order="pool_norm")
    save(tmp_path / "model", config=config)
    shutil.copy(tmp_path / "model" / "model.safetensors", tmp_path / "alone.safetensors")
    model, _ = load_pretrained(tmp_path / "alone.safetensors")
    assert model.config == config


def test_the_authors_identity_ablation_is_told_by_its_file_name(tmp_path):
    save(tmp_path / "model", "sail", dataclasses.replace(CONFIG, token_mixers=("identity",) * 4))
    shutil.copy(tmp_path / "model" / "model.pth.tar", tmp_path / "metaformer_id_s12.pth.tar")
    model, _ = load_pretrained(tmp_path / "metaformer_id_s12.pth.tar")
    assert model.config.token_mixers == ("identity",) * 4


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
@pytest.mark.parametrize("file", ["timm_checkpoint.pth.tar", "sail_checkpoint_legacy.pth.tar"])
def test_timms_config_gives_labels_and_the_order_of_its_head_whatever_the_names(tmp_path, file, entries, labels):
    shutil.copy(FIXTURES / file, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(TIMM_CONFIG | entries))
    model, _ = load_pretrained(tmp_path)
    assert (model.config.head_order, model.config.id2label) == ("pool_norm", labels)


def test_a_config_without_labels_takes_their_number_from_the_weights(tmp_path):
    shutil.copytree(FIXTURES / "hf_sharded", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["id2label"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    model, _ = load_pretrained(tmp_path / "model")
    assert (model.config.num_labels, model.config.id2label) == (3, None)


def test_another_number_of_classes_needs_a_new_head():
    source = FIXTURES / "hf_sharded"
    with pytest.raises(ValueError, match=r"head for 3 classes, and num_labels=10 was asked for.*reset_head=True"):
        load_pretrained(source, num_labels=10)
    kept, before = load_pretrained(source, num_labels=3)
    assert kept.config.id2label == LABELS
    model, after = load_pretrained(source, num_labels=10, reset_head=True)
    assert (model.config.num_labels, model.config.id2label) == (10, None)
    head = after["params"].pop("head")
    assert (head["kernel"].shape, float(jnp.abs(head["bias"]).max())) == ((8, 10), 0.0)
    assert 0.01 < float(head["kernel"].std()) < 0.03
    del before["params"]["head"]
    assert same(after, before)


def test_the_key_draws_the_new_head_and_nothing_else():
    def load(**options):
        return load_pretrained(FIXTURES / "hf_sharded", num_labels=10, reset_head=True, **options)

    model, first = load(key=jax.random.key(1))
    _, again = load(key=jax.random.key(1))
    other_model, other = load(key=jax.random.key(2))
    assert same(again, first)
    assert other_model == model
    assert not np.array_equal(other["params"]["head"].pop("kernel"), first["params"]["head"].pop("kernel"))
    assert same(other, first)
    assert same(load()[1], load(key=jax.random.key(0))[1])


def test_a_key_for_a_head_that_is_kept_is_refused():
    with pytest.raises(ValueError, match=r"A key was given, and the head is the file's\..*reset_head=True"):
        load_pretrained(FIXTURES / "hf_sharded", key=jax.random.key(1))


def test_a_backbone_gets_a_new_norm_and_head_or_an_explanation():
    with pytest.raises(ValueError, match=r"backbone without final norm and head\. Pass num_labels=\.\.\. and"):
        load_pretrained(FIXTURES / "hf_backbone.bin")
    model, variables = load_pretrained(FIXTURES / "hf_backbone.bin", num_labels=5, reset_head=True)
    assert jax.jit(model.apply)(variables, np.ones((1, 64, 64, 3), np.float32)).logits.shape == (1, 5)
    _, features = load_pretrained(FIXTURES / "hf_backbone.bin", num_labels=0, reset_head=True)
    assert set(features["params"]) >= {"norm"} and "head" not in features["params"]


def make_cache(folder, name, files, commit="0123456789abcdef0123456789abcdef01234567"):
    """The Hub's cache as huggingface_hub lays it out: files by their hash, and links to them for every commit."""
    repository = folder / ("models--" + name.replace("/", "--"))
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    for index, file in enumerate(files):
        shutil.copy(file, repository / "blobs" / f"blob{index}")
        (snapshot / Path(file).name).symlink_to(Path("../../blobs") / f"blob{index}")
    return folder


@pytest.mark.parametrize(
    "files", [["hf_sharded/config.json", "hf_sharded/model.safetensors.index.json", "shards"], None]
)
def test_a_model_in_the_hubs_cache_is_loaded_without_asking_the_hub(tmp_path, files):
    if files:
        paths = sorted((FIXTURES / "hf_sharded").iterdir())
    else:  # as the first uploads were: config.json and pytorch_model.bin
        shutil.copy(FIXTURES / "hf.bin", tmp_path / "pytorch_model.bin")
        paths = [FIXTURES / "hf_sharded" / "config.json", tmp_path / "pytorch_model.bin"]
    cache = make_cache(tmp_path / "hub", "someone/tiny", paths)
    model, variables = load_pretrained("someone/tiny", cache_dir=cache, local_files_only=True)
    assert model.config.id2label == LABELS
    _, from_file = load_pretrained(FIXTURES / "hf.bin")
    assert same(variables, from_file)


def test_a_revision_in_the_hubs_cache_is_the_one_that_is_loaded(tmp_path):
    cache = make_cache(tmp_path, "someone/tiny", sorted((FIXTURES / "hf_sharded").iterdir()))
    commit = "0123456789abcdef0123456789abcdef01234567"
    load_pretrained("someone/tiny", revision=commit, cache_dir=cache, local_files_only=True)
    with pytest.raises(FileNotFoundError, match="not in the Hub's cache"):
        load_pretrained("someone/tiny", revision="v2", cache_dir=cache, local_files_only=True)


def test_a_model_that_is_nowhere_says_where_it_was_looked_for(tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"'sail/poolformer_s12' is no file or folder here and not in the Hub's"
    ):
        load_pretrained("sail/poolformer_s12", cache_dir=tmp_path, local_files_only=True)
    for nowhere in (tmp_path / "model.pth", "s12", "folder/model.safetensors", "./some/model"):
        with pytest.raises(FileNotFoundError, match=r"There is no model at .*a name on the Hugging Face Hub such as"):
            load_pretrained(nowhere)
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        load_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'poolformer-jax\[hub\]'"):
        load_pretrained("sail/poolformer_s12")


def test_safetensors_are_preferred_and_an_ambiguous_folder_is_told(tmp_path):
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "holds a list. Expected an object"),
        ('{"model_type": "vit"}', "is of a 'vit' model"),
        ('{"model_type": "poolformer", "depths": 3}', "malformed"),
        ('{"model_type": "poolformer", "id2label": ["cat"]}', "malformed"),
        ('{"model_type": "poolformer", "depths": [1000000000, 1, 1, 1], "num_labels": 3}', "1000000003 blocks in all"),
        ('{"architecture": "poolformer_s12", "pretrained_cfg": 7}', "malformed"),
        (
            '{"model_type": "poolformer", "depths": [1, 1, 3, 1], "hidden_sizes": [2, 4, 6, 8], "num_labels": 3}',
            "missing",
        ),
    ],
)
def test_a_wrong_config_is_told(tmp_path, text, message):
    shutil.copytree(FIXTURES / "hf_sharded", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path / "model")


@pytest.mark.parametrize("exists", [False, True])
def test_a_save_that_fails_leaves_what_was_there(tmp_path, exists):
    folder = tmp_path / "model"
    if exists:
        save(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()} if exists else None

    def breaks():
        yield parameter("any", leaves(CONFIG)[0].shape)
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        write_model(folder, CONFIG, "jax", breaks())
    assert [path.name for path in tmp_path.iterdir()] == (["model"] if exists else [])
    assert before == ({path.name: path.read_bytes() for path in folder.iterdir()} if exists else None)


def test_a_folder_is_overwritten_by_its_own_layout_and_by_no_other(tmp_path):
    save(tmp_path / "model")
    changed = make_variables(CONFIG)
    changed["params"]["head"]["bias"] += 1
    save_pretrained(tmp_path / "model", PoolFormerForImageClassification(CONFIG), changed)
    assert same(load_pretrained(tmp_path / "model")[1], changed)
    with pytest.raises(ValueError, match=r"holds other weights already \(model.safetensors\)"):
        save(tmp_path / "model", "sail")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"is a file. Expected the name of a folder"):
        save(tmp_path / "file")


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        (
            "hf",
            {"token_mixers": ("identity",) * 4},
            r"hf cannot compute a network with token_mixers=.*'jax' holds",
        ),
        ("hf", {"norm": "layer_norm"}, "cannot compute a network with norm='layer_norm'"),
        ("timm", {}, r"timm\.create_model has no network of depths"),
        ("keras", {}, "There is no layout 'keras'"),
        ("hf", {"num_channels": 1}, "this network has 1. Pass image_processor"),
    ],
)
def test_what_a_home_cannot_compute_is_not_saved_for_it(tmp_path, layout, changes, message):
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "model", layout, dataclasses.replace(CONFIG, **changes))
    assert not list(tmp_path.iterdir())


def test_variables_of_another_network_are_not_saved(tmp_path):
    variables = make_variables(CONFIG)
    del variables["params"]["norm"]
    with pytest.raises(WeightsMismatch, match="missing: norm/scale"):
        save_pretrained(tmp_path / "model", PoolFormerForImageClassification(CONFIG), variables)
    assert not list(tmp_path.iterdir())


def test_another_order_of_the_head_is_warned_of_and_written_as_the_home_computes_it(tmp_path):
    config = dataclasses.replace(CONFIG, head_order="pool_norm")
    with pytest.warns(UserWarning, match="head_order='pool_norm', and the model of hf computes 'norm_pool'"):
        save(tmp_path / "model", "hf", config)
    assert load_pretrained(tmp_path / "model")[0].config.head_order == "norm_pool"


def test_the_files_are_those_their_own_libraries_read(tmp_path):
    saved = save(tmp_path / "hf", "hf")
    with safe_open(tmp_path / "hf" / "model.safetensors", framework="numpy") as opened:
        assert opened.metadata() == {"format": "pt"}
        np.testing.assert_array_equal(opened.get_tensor("norm.bias"), saved["params"]["norm"]["bias"], strict=True)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert not {"head_order", "token_mixers", "norm", "image_size"} & set(config)
    save(tmp_path / "sail", "sail")
    opened = open_weights(tmp_path / "sail" / "model.pth.tar")
    assert (opened.container, opened.wrapping) == ("torch zip", None)


def test_the_default_preprocessing_is_that_of_the_published_variant(tmp_path):
    config = PoolFormerConfig.from_variant("s12", num_labels=0)
    save(tmp_path / "model", config=config)
    assert PoolFormerImageProcessor.from_pretrained(tmp_path / "model") == PoolFormerImageProcessor.for_variant("s12")
    assert "head" not in load_pretrained(tmp_path / "model")[1]["params"]


def test_a_damaged_file_is_told_with_its_path(tmp_path):
    save(tmp_path / "model")
    content = (tmp_path / "model" / "model.safetensors").read_bytes()
    (tmp_path / "model" / "model.safetensors").write_bytes(content[:-7])
    with pytest.raises(WeightsFileError, match=r"Cannot read the weights in .*model\.safetensors"):
        load_pretrained(tmp_path / "model")

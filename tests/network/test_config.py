"""A PoolFormerConfig is checked when made, survives JSON, and reads what transformers wrote."""

import dataclasses
import json
import subprocess
import sys
from typing import get_args

import numpy as np
import pytest

from paths import ROOT
from poolformer_jax import (
    MetaFormerConfig,
    MetaFormerForImageClassification,
    MetaFormerModel,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    PoolFormerModel,
)
from poolformer_jax.network import VARIANTS, ProblemType, published_variant

# config.json of sail/poolformer_s12 on the Hub, shortened to three labels.
HF_CONFIG = {
    "architectures": ["PoolFormerForImageClassification"],
    "depths": [2, 2, 6, 2],
    "drop_path_rate": 0.0,
    "hidden_act": "gelu",
    "hidden_sizes": [64, 128, 320, 512],
    "id2label": {"0": "tench", "1": "goldfish", "10": "brambling", "2": "great white shark"}
    | {str(n): f"class {n}" for n in range(3, 10)},
    "initializer_range": 0.02,
    "layer_scale_init_value": 1e-05,
    "mlp_ratio": 4.0,
    "model_type": "poolformer",
    "num_channels": 3,
    "num_encoder_blocks": 4,
    "padding": [2, 1, 1, 1],
    "patch_size": 16,
    "patch_sizes": [7, 3, 3, 3],
    "pool_size": 3,
    "stride": 16,
    "strides": [4, 2, 2, 2],
    "torch_dtype": "float32",
    "transformers_version": "4.16.0",
    "use_layer_scale": True,
}


@pytest.mark.parametrize("variant", ["s12", "metaformer_ppff_s12_224", "poolformerv2_s12", "caformer_s18"])
def test_config_json_says_poolformer_only_for_networks_of_the_first_paper(variant):
    first = not variant.startswith(("poolformerv2", "caformer"))
    data = PoolFormerConfig.from_variant(variant).to_dict()
    assert data["model_type"] == ("poolformer" if first else "metaformer")
    assert data["architectures"] == [f"{'PoolFormer' if first else 'MetaFormer'}ForImageClassification"]
    assert ("norm_bias" in data) is not first


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_recognised_by_its_architecture_with_any_head(variant):
    assert published_variant(PoolFormerConfig.from_variant(variant)) == variant
    changed = {"num_labels": 3, "drop_path_rate": 0.1, "head_order": "pool_norm"}
    assert published_variant(PoolFormerConfig.from_variant(variant, **changed)) == variant


@pytest.mark.parametrize(
    "change", [{"depths": (1, 1, 1, 1)}, {"pool_size": 5}, {"hidden_act": "relu"}, {"padding": (3, 1, 1, 1)}]
)
def test_another_architecture_is_no_variant(change):
    assert published_variant(PoolFormerConfig.from_variant("s12", **change)) is None


def test_the_names_of_transformers_are_those_of_the_general_classes():
    assert PoolFormerConfig is MetaFormerConfig
    assert PoolFormerForImageClassification is MetaFormerForImageClassification
    assert PoolFormerModel is MetaFormerModel


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_survives_json(variant):
    config = PoolFormerConfig.from_variant(variant, num_labels=2, id2label={0: "cat", 1: "dog"})
    assert PoolFormerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_equal_configs_are_equal_dictionary_keys():
    first = PoolFormerConfig.from_variant("s12", num_labels=1, id2label={0: "cat"})
    second = PoolFormerConfig.from_dict(first.to_dict())
    assert {first: "compiled"}[second] == "compiled"


def test_a_config_from_transformers_is_read_unchanged():
    config = PoolFormerConfig.from_dict(HF_CONFIG)
    expected = PoolFormerConfig.from_variant("s12", num_labels=11)
    assert dataclasses.replace(config, id2label=None) == expected
    assert config.id2label[10] == "brambling"


@pytest.mark.parametrize("problem", get_args(ProblemType))
def test_the_problem_type_is_read_and_written(problem):
    config = PoolFormerConfig.from_dict({**HF_CONFIG, "problem_type": problem})
    assert config.problem_type == config.to_dict()["problem_type"] == problem
    assert "problem_type" not in PoolFormerConfig().to_dict()


def test_a_single_label_cannot_be_one_of_several():
    with pytest.raises(ValueError, match=r"expected num_labels of at least 2.* or 'regression'"):
        PoolFormerConfig(num_labels=1, problem_type="single_label_classification")


@pytest.mark.parametrize("names", [{"0": "cat", "1": "dog"}, {0: "cat", 1: "dog"}, ["cat", "dog"]])
def test_names_are_taken_from_json_or_a_list_and_set_the_number_of_labels(names):
    config = PoolFormerConfig(id2label=names)
    assert (config.num_labels, config.id2label, config.label2id) == (2, {0: "cat", 1: "dog"}, {"cat": 0, "dog": 1})
    assert (
        PoolFormerConfig(label2id={"cat": "0", "dog": 1})
        == config
        == PoolFormerConfig.from_variant("s12", id2label=names)
    )
    with pytest.raises(ValueError, match="num_labels=3: expected id2label to have a name for every index"):
        PoolFormerConfig(id2label=names, num_labels=3)


def test_arguments_of_transformers_without_effect_are_accepted():
    arguments = {"patch_size": 16, "stride": 16, "initializer_range": 0.02, "torch_dtype": "float32"}
    assert PoolFormerConfig(**arguments, transformers_version="4.16.0", num_encoder_blocks=4) == PoolFormerConfig()
    three = PoolFormerConfig(depths=[1, 1, 1], hidden_sizes=[8, 8, 16], num_encoder_blocks=3)
    assert three.num_encoder_blocks == len(three.strides) == len(three.token_mixers) == 3
    with pytest.raises(ValueError, match="num_encoder_blocks=3: expected one for each of depths"):
        PoolFormerConfig(num_encoder_blocks=3)


def test_a_config_is_written_to_and_read_from_any_file(tmp_path):
    config = PoolFormerConfig.from_variant("m36", num_labels=3)
    config.to_json_file(tmp_path / "mine.json")
    assert PoolFormerConfig.from_json_file(tmp_path / "mine.json") == config
    assert PoolFormerConfig.from_dict(config.to_dict(), drop_path_rate=0.5).drop_path_rate == 0.5


def test_a_config_is_saved_and_read_from_a_folder_with_changes(tmp_path):
    config = PoolFormerConfig.from_variant("s24", id2label=["cat", "dog"], problem_type="multi_label_classification")
    config.save_pretrained(tmp_path / "new")
    assert (tmp_path / "new/config.json").read_text() == config.to_json_string()
    assert PoolFormerConfig.from_pretrained(tmp_path / "new") == config
    assert PoolFormerConfig.from_pretrained(tmp_path / "new/config.json", num_labels=2).id2label == config.id2label
    changed = PoolFormerConfig.from_pretrained(tmp_path / "new", num_labels=3, drop_path_rate=0.1)
    assert (changed.num_labels, changed.id2label, changed.drop_path_rate) == (3, None, 0.1)
    assert PoolFormerConfig.from_pretrained(tmp_path / "new", id2label=["a", "b", "c"]).num_labels == 3
    with pytest.raises(FileNotFoundError, match=r"There is no .*config\.json"):
        PoolFormerConfig.from_pretrained(tmp_path)


def test_a_config_from_transformers_without_labels_has_two():
    without_labels = {name: value for name, value in HF_CONFIG.items() if name != "id2label"}
    assert PoolFormerConfig.from_dict(without_labels).num_labels == 2
    ours = {name: value for name, value in without_labels.items() if name != "transformers_version"}
    assert PoolFormerConfig.from_dict(ours).num_labels == 1000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"model_type": "vit"}, r"describes a 'vit' model\. Expected model_type 'poolformer' or 'metaformer'"),
        (
            {"architectures": ["ResNetForImageClassification"]},
            r"architectures=\['ResNetForImageClassification'\]\. Expected",
        ),
        ({"architecture": "poolformer_m48", "num_classes": 3}, r"timm's, for 'poolformer_m48'.*load_pretrained reads"),
        ({"depth": [2, 2, 2, 2]}, r"has no field depth\. Did you mean depths\? Its fields: .*depths"),
    ],
)
def test_configs_of_other_architectures_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        PoolFormerConfig.from_dict(data)


def test_a_poolformer_may_have_another_number_of_stages():
    config = PoolFormerConfig.from_dict(
        {"depths": [1, 2], "hidden_sizes": [8, 16], "patch_sizes": [3, 3], "strides": [2, 2], "padding": [1, 1]}
    )
    assert config.token_mixers == ("pooling", "pooling")
    assert config.total_stride == 4


def test_a_config_from_transformers_may_list_more_kernels_than_stages():
    three = {"depths": [1, 2, 1], "hidden_sizes": [8, 12, 16], "num_encoder_blocks": 3}
    config = PoolFormerConfig.from_dict(HF_CONFIG | three)
    assert (config.patch_sizes, config.strides, config.padding) == ((7, 3, 3), (4, 2, 2), (2, 1, 1))


@pytest.mark.parametrize(
    ("changes", "side"),
    [({}, 32), ({"padding": (0, 0, 0, 0)}, 63), ({"strides": (1, 1, 1, 1), "padding": (0, 0, 0, 0)}, 13)],
)
def test_the_smallest_side_leaves_a_pixel_at_every_stage(changes, side):
    config = PoolFormerConfig(**changes)
    assert config.smallest_side == side
    assert min(config.feature_sizes(side)) >= 1
    assert side == config.total_stride or min(config.feature_sizes(side - 1)) < 1
    assert dataclasses.replace(config, image_size=side).image_size == side
    with pytest.raises(ValueError, match=f"expected None, or {side} "):
        dataclasses.replace(config, image_size=side - 1)


def test_one_message_names_all_problems():
    with pytest.raises(ValueError) as error:
        PoolFormerConfig(pool_size=4, hidden_sizes=(8, 8), norm="batch_norm", drop_path_rate=1.0)
    for part in ("pool_size=4: expected a positive odd", "hidden_sizes=(8, 8): expected one entry for each of the 4"):
        assert part in str(error.value)
    for part in ("norm='batch_norm': expected one of group_norm, layer_norm", "drop_path_rate=1.0"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": ()}, "at least one stage"),
        ({"num_labels": -1}, "num_labels=-1: expected 0"),
        (
            {"num_labels": 1000, "id2label": {0: "cat"}},
            "num_labels=1000: expected id2label to have a name for every index .* but it has 1",
        ),
        ({"token_mixers": ("spatial_fc",) * 4}, "image_size=None"),
        ({"image_size": 16}, "image_size=16: expected None, or 32 "),
        ({"head_order": "pool"}, "norm_pool, pool_norm"),
        ({"mlp_ratio": 0.01}, "mlp_ratio=0.01: expected a positive number"),
        ({"hidden_act": "swiglu"}, "hidden_act='swiglu': expected one of gelu, gelu_10"),
        (
            {"token_mixers": ("pooling", "convolution") * 2},
            r"token_mixers=\('pooling', 'convolution'.*: expected names a",
        ),
        ({"residual_scale_init_values": (None, 1.0)}, "None, or one entry for each of the 4 stages"),
        ({"head": "conv"}, "head='conv': expected one of linear, mlp"),
        ({"norm_epsilon": 0}, "norm_epsilon=0.*: expected a positive number"),
    ],
)
def test_a_field_out_of_range_is_named_with_what_was_expected(changes, message):
    with pytest.raises(ValueError, match=message):
        PoolFormerConfig.from_variant("s12", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_ratio": "4"}, "mlp_ratio='4': expected a finite number"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio=inf: expected a finite number"),
        ({"drop_path_rate": True}, "drop_path_rate=True: expected a finite number"),
        ({"pool_size": 3.0}, r"pool_size=3\.0: expected a whole number"),
        ({"num_labels": "10"}, "num_labels='10': expected a whole number"),
        ({"depths": 2}, "depths=2: expected a sequence of whole numbers"),
        ({"depths": (2, 2, 6, 2.0)}, "depths=.*: expected a sequence of whole numbers"),
        ({"token_mixers": "pooling"}, "token_mixers='pooling': expected a sequence of names"),
        ({"position_embeddings": (0, 0, 0, 1)}, "position_embeddings=.*: expected a sequence of True or False"),
        ({"use_layer_scale": "False"}, "use_layer_scale='False': expected True or False"),
        ({"hidden_act": None}, "hidden_act=None: expected a text"),
        ({"image_size": "224"}, "image_size='224': expected None, or a whole number"),
        ({"id2label": {"first": "cat"}}, "id2label=.*: expected None, or a mapping from indices to names"),
        ({"problem_type": "multi_label"}, "problem_type='multi_label': expected None, or one of single"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "make", [PoolFormerConfig, lambda **changes: PoolFormerConfig.from_dict(changes)], ids=["made", "read"]
)
def test_a_field_of_a_wrong_type_is_named_with_what_was_expected(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_numpy_numbers_and_whole_ratios_become_python_numbers():
    given = PoolFormerConfig(depths=np.array([2, 2, 6, 2]), mlp_ratio=np.float32(4), pool_size=np.int64(3))
    assert given == PoolFormerConfig(mlp_ratio=4) == PoolFormerConfig()
    assert json.loads(json.dumps(given.to_dict())) == PoolFormerConfig().to_dict()


def test_the_message_for_an_unknown_variant_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no variant 's13'.*s12, s24"):
        PoolFormerConfig.from_variant("s13")


def test_the_config_and_the_table_of_parameters_need_no_jax():
    code = """
import sys
from typing import get_args
from poolformer_jax.network import PoolFormerConfig, count_parameters
assert count_parameters(PoolFormerConfig.from_variant("s12", id2label=None)) == 11_915_176
print("jax" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"

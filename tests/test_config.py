"""A PoolFormerConfig is checked when made, survives JSON, and reads what transformers wrote."""

import dataclasses
import json

import pytest

from poolformer_jax import PoolFormerConfig
from poolformer_jax.config import VARIANTS

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


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_survives_json(variant):
    config = PoolFormerConfig.from_variant(variant, num_labels=2, id2label={0: "cat", 1: "dog"})
    assert PoolFormerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_equal_configs_are_equal_keys():
    first = PoolFormerConfig.from_variant("s12", num_labels=1, id2label={0: "cat"})
    second = PoolFormerConfig.from_dict(first.to_dict())
    assert {first: "compiled"}[second] == "compiled"


def test_a_config_of_transformers_is_read_as_it_is():
    config = PoolFormerConfig.from_dict(HF_CONFIG)
    expected = PoolFormerConfig.from_variant("s12", num_labels=11)
    assert dataclasses.replace(config, id2label=None) == expected
    assert config.id2label[10] == "brambling"


def test_transformers_leaves_its_default_of_two_labels_out():
    without_labels = {name: value for name, value in HF_CONFIG.items() if name != "id2label"}
    assert PoolFormerConfig.from_dict(without_labels).num_labels == 2
    ours = {name: value for name, value in without_labels.items() if name != "transformers_version"}
    assert PoolFormerConfig.from_dict(ours).num_labels == 1000


def test_another_architecture_is_refused():
    with pytest.raises(ValueError, match=r"of a 'vit' model\. Expected model_type 'poolformer'"):
        PoolFormerConfig.from_dict({"model_type": "vit"})


def test_a_poolformer_may_have_another_number_of_stages():
    config = PoolFormerConfig.from_dict(
        {"depths": [1, 2], "hidden_sizes": [8, 16], "patch_sizes": [3, 3], "strides": [2, 2], "padding": [1, 1]}
    )
    assert config.token_mixers == ("pooling", "pooling")
    assert config.total_stride == 4


def test_all_problems_are_told_together():
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
        ({"id2label": {0: "cat"}}, "id2label names 1 classes and num_labels is 1000"),
        ({"token_mixers": ("spatial_fc",) * 4}, "image_size=None"),
        ({"image_size": 16}, "at least the network's stride of 32"),
        ({"head_order": "pool"}, "norm_pool, pool_norm"),
        ({"depth": (1, 1, 1, 1)}, "has no field depth"),
    ],
)
def test_a_bad_field_is_named_with_what_was_expected(changes, message):
    with pytest.raises(ValueError, match=message):
        PoolFormerConfig.from_variant("s12", **changes)


def test_an_unknown_variant_is_told_the_known_ones():
    with pytest.raises(ValueError, match=r"no variant 's13'.*s12, s24"):
        PoolFormerConfig.from_variant("s13")

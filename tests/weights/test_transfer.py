"""State dicts become parameter trees and back, bit for bit; every name that does not match is reported."""

import dataclasses
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from golden import published
from golden.fixture_values import parameter
from poolformer_jax import PoolFormerConfig, WeightsMismatch, from_torch_state_dict, to_torch_state_dict
from poolformer_jax.network.variants import VARIANTS
from poolformer_jax.weights import leaves
from poolformer_jax.weights.transfer import match_state_dict, plan_import
from selection import slow_after

SMALL = PoolFormerConfig(depths=(1, 1, 2, 1), hidden_sizes=(2, 4, 6, 8), num_labels=3)


def state_dict(config, layout, **options):
    return {leaf.name: parameter(leaf.name, leaf.stored_shape) for leaf in leaves(config, layout, **options)}


def detect(shapes):
    state_dict = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    return plan_import(match_state_dict(state_dict))


def assert_same_arrays(actual, expected):
    assert list(actual) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, strict=True)
        assert actual[name].flags.c_contiguous


@pytest.mark.parametrize("layout", published.LAYOUTS)
def test_the_published_weights_come_back_bit_for_bit_from_any_order(layout):
    original = published.state_dict(layout, "s12")
    shuffled = list(original.items())
    random.Random(0).shuffle(shuffled)
    config, variables = from_torch_state_dict(dict(shuffled))
    assert_same_arrays(to_torch_state_dict(config, variables, layout), original)


@pytest.mark.parametrize("variant", published.VARIANTS)
@pytest.mark.parametrize("layout", published.LAYOUTS)
def test_layout_variant_classes_and_head_order_are_inferred_from_names_and_shapes(layout, variant):
    detection = detect(published.shapes(layout, variant))
    assert (detection.layout, detection.variant) == (layout, variant)
    order = "pool_norm" if layout == "timm" else "norm_pool"
    assert detection.config == PoolFormerConfig.from_variant(variant, head_order=order)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("metaformer")])
def test_ablations_are_recognised_except_for_identity_mixers_which_have_no_arrays(variant):
    config = PoolFormerConfig.from_variant(variant)
    detection = detect({leaf.name: leaf.stored_shape for leaf in leaves(config, "sail")})
    assert detection.config == (PoolFormerConfig() if variant == "metaformer_id_s12" else config)


@st.composite
def networks(draw):
    """Fields of a config. The config is made in the test: type checks use random numbers, which strategies must not."""
    stages = draw(st.integers(1, 4))
    per_stage = lambda values: st.lists(values, min_size=stages, max_size=stages).map(tuple)  # noqa: E731
    widths = draw(per_stage(st.integers(1, 9)))
    return {
        "num_channels": draw(st.integers(1, 4)),
        "depths": draw(per_stage(st.integers(1, 3))),
        "hidden_sizes": widths,
        "mlp_ratio": draw(st.sampled_from([1.0, 2.0, 4.0, 8 / 3])) if min(widths) > 1 else 4.0,
        "num_labels": draw(st.integers(0, 5)),
        "use_layer_scale": draw(st.booleans()),
        "patch_sizes": (7, 3, 3, 3)[:stages],
        "strides": (4, 2, 2, 2)[:stages],
        "padding": (2, 1, 1, 1)[:stages],
        "token_mixers": ("pooling",) * stages,
        "position_embeddings": (False,) * stages,
    }


@settings(deadline=None, max_examples=12)
@given(
    fields=networks(), layout=st.sampled_from(["sail", "hf", "timm", "jax"]), prefix=st.sampled_from(["", "module."])
)
def test_any_network_is_inferred_from_its_arrays_and_converts_back_bit_for_bit(fields, layout, prefix):
    config = PoolFormerConfig(**fields)
    original = state_dict(config, layout)
    found, variables = from_torch_state_dict({prefix + name: array for name, array in original.items()})
    for field in ("num_channels", "depths", "hidden_sizes", "num_labels", "use_layer_scale", "token_mixers"):
        assert getattr(found, field) == getattr(config, field)
    hidden = [[int(width * ratio) for width in config.hidden_sizes] for ratio in (found.mlp_ratio, config.mlp_ratio)]
    assert hidden[0] == hidden[1]
    assert_same_arrays(to_torch_state_dict(found, variables, layout), original)


def test_parameters_are_copies_of_the_state_dicts_arrays():
    original = state_dict(SMALL, "sail")
    _, variables = from_torch_state_dict(original)
    for array in original.values():
        array[...] = 7
    assert not any((leaf == 7).all() for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize("layout", ["sail", "hf", "timm", "jax"])
def test_a_state_dict_is_a_copy_that_pytorch_may_change(layout):
    config, variables = from_torch_state_dict(state_dict(SMALL, "sail"))
    variables = jax.tree.map(jnp.asarray, variables)  # which NumPy sees without a copy
    before = jax.tree.map(np.array, variables)
    for array in to_torch_state_dict(config, variables, layout).values():
        array -= 1  # as torch.from_numpy and one step of an optimizer do
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, before))


def test_all_mismatches_are_reported_at_once_with_the_nearest_name():
    broken = state_dict(SMALL, "timm")
    broken["stages.2.blocks.1.mlp.fc3.weight"] = broken.pop("stages.2.blocks.1.mlp.fc2.weight")
    broken["head.fc.bias"] = np.zeros(4, np.float32)
    del broken["stages.3.blocks.0.norm1.bias"]
    with pytest.raises(WeightsMismatch) as raised:
        from_torch_state_dict(broken)
    error = raised.value
    assert error.missing == {"stages.2.blocks.1.mlp.fc2.weight": (6, 24, 1, 1), "stages.3.blocks.0.norm1.bias": (8,)}
    assert error.unexpected == {"stages.2.blocks.1.mlp.fc3.weight": (6, 24, 1, 1)}
    assert error.misshaped == {"head.fc.bias": ((4,), (3,))}
    message = str(error)
    assert "in the layout 'timm'" in message
    assert "missing: stages.2.blocks.1.mlp.fc2.weight [6, 24, 1, 1]; the nearest name on the other side is" in message
    assert "misshaped: head.fc.bias [4], expected [3]" in message


@pytest.mark.parametrize("layout", slow_after(1, ["sail", "hf", "timm"]))
def test_the_network_is_inferred_in_spite_of_one_damaged_array(layout):
    # Every parameter outside of blocks, and those of one block.
    whole = state_dict(SMALL, layout)
    for leaf in leaves(SMALL, layout):
        if "blocks" in leaf.path and "stages_2/blocks_1/" not in leaf.path:
            continue
        with pytest.raises(WeightsMismatch) as raised:
            from_torch_state_dict({name: array for name, array in whole.items() if name != leaf.name})
        assert raised.value.missing == {leaf.name: leaf.stored_shape}
        with pytest.raises(WeightsMismatch) as raised:
            from_torch_state_dict(whole | {leaf.name: np.zeros((11, 13, 1), np.float32)})
        assert raised.value.misshaped == {leaf.name: ((11, 13, 1), leaf.stored_shape)}


def test_messages_shorten_and_escape_hostile_names():
    hostile = {"module." * 200_000 + "a": 1, "\x1b[2Jnorm.weight": 1, "norm.weight" * 100_000: 1}
    broken = state_dict(SMALL, "sail") | {name: np.zeros(size, np.float32) for name, size in hostile.items()}
    with pytest.raises(WeightsMismatch) as raised:
        from_torch_state_dict(broken)
    assert len(str(raised.value)) < 2000
    assert "\x1b" not in str(raised.value)
    with pytest.raises(ValueError, match="not those of a PoolFormer") as unknown:
        from_torch_state_dict({name: np.zeros(1, np.float32) for name in hostile})
    assert len(str(unknown.value)) < 2000


def test_a_long_list_of_mismatches_is_shortened_with_a_count():
    broken = state_dict(SMALL, "hf") | {f"more.{index}": np.zeros(1, np.float32) for index in range(50)}
    with pytest.raises(WeightsMismatch, match="unexpected: and 30 more"):
        from_torch_state_dict(broken)


def test_a_lost_block_is_reported_as_missing():
    broken = {name: array for name, array in state_dict(SMALL, "sail").items() if not name.startswith("network.4.0.")}
    with pytest.raises(WeightsMismatch) as raised:
        from_torch_state_dict(broken)
    assert len(raised.value.missing) == 10
    assert all(name.startswith("network.4.0.") for name in raised.value.missing)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({}, "These 0 names are not those of a PoolFormer"),
        (
            {"layer1.0.conv1.weight": (64, 64, 3, 3)},
            r"a PoolFormer: layer1\.0\.conv1\.weight.*Expected names as in",
        ),
        ({"stem.conv.weight": (64, 3, 7, 7), "stem.norm.weight": (64,)}, "These 2 names are not those of"),
        ({"stages.999999999.blocks.0.norm1.weight": (4,)}, "numbered up to 1000000000 stages"),
        ({"stages.0.blocks.999999999.norm1.weight": (4,)}, "1000000000 blocks"),
        ({"network.0.0.norm1.weight": (4,), "network.9.proj.weight": (4, 4, 3, 3)}, "no array of stage|missing"),
    ],
)
def test_weights_of_other_models_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        from_torch_state_dict({name: np.zeros(shape, np.float32) for name, shape in names.items()})


def test_unpublished_kernel_sizes_need_a_config():
    config = dataclasses.replace(SMALL, patch_sizes=(5, 3, 3, 3))
    original = state_dict(config, "sail")
    with pytest.raises(ValueError, match=r"into stage 0 has a kernel of 5, .* pass its PoolFormerConfig"):
        from_torch_state_dict(original)
    found, variables = from_torch_state_dict(original, config)
    assert found == config
    assert_same_arrays(to_torch_state_dict(config, variables, "sail"), original)


def test_a_config_that_does_not_match_the_weights_is_refused():
    with pytest.raises(
        WeightsMismatch, match=r"according to the config given:\n  misshaped: head.weight \[3, 8\], expected"
    ):
        from_torch_state_dict(
            state_dict(SMALL, "sail"), PoolFormerConfig(depths=SMALL.depths, hidden_sizes=(2, 4, 6, 8))
        )


def test_identity_mixers_come_from_the_config_given():
    config = PoolFormerConfig(depths=(1,) * 4, hidden_sizes=(4,) * 4, num_labels=2, token_mixers=("identity",) * 4)
    found, _ = from_torch_state_dict(state_dict(config, "sail"), config)
    assert found.token_mixers == ("identity",) * 4


@pytest.mark.parametrize("prefix", ["", "poolformer."])
def test_a_backbone_of_transformers_gives_the_backbones_tree(prefix):
    names = state_dict(SMALL, "hf", classifier=False)
    config, variables = from_torch_state_dict(
        {prefix + name.removeprefix("poolformer."): names[name] for name in names}
    )
    assert (config.num_labels, config.depths) == (0, SMALL.depths)
    assert set(variables["params"]) == {"stem", "stages_0", "stages_1", "stages_2", "stages_3"}
    assert_same_arrays(to_torch_state_dict(config, variables, "hf"), names)


@pytest.mark.parametrize("layout", ["sail", "hf", "timm", "jax"])
@pytest.mark.parametrize("prefix", ["module.", "timm_model.net._orig_mod."])
def test_a_wrappers_prefix_is_ignored(layout, prefix):
    original = state_dict(SMALL, layout)
    wrapped = {prefix + name: array for name, array in original.items()}
    averaged = {"n_averaged": np.zeros((), np.int64), **wrapped}  # torch.optim.swa_utils.AveragedModel
    config, variables = from_torch_state_dict(averaged)
    assert_same_arrays(to_torch_state_dict(config, variables, layout), original)
    with pytest.raises(WeightsMismatch) as raised:
        from_torch_state_dict(wrapped | {"stray": np.zeros(1, np.float32)})
    assert (raised.value.missing, raised.value.unexpected) == ({}, {"stray": (1,)})


@pytest.mark.parametrize(
    ("layout", "pattern", "replacement"),
    [
        ("timm", r"^(stages\.\d)\.", r"\1._orig_mod."),
        ("timm", r"^(stages\.\d\.blocks\.\d)\.", r"module._fsdp_wrapped_module.\1._checkpoint_wrapped_module."),
        ("sail", r"^(network\.\d+)\.", r"\1.module."),
        ("sail", r"^(?!head)", "model.backbone."),  # the head is outside of the wrapper
    ],
)
def test_wrappers_of_a_network_and_of_its_parts_are_ignored(layout, pattern, replacement):
    original = state_dict(SMALL, layout)
    wrapped = {re.sub(pattern, replacement, name): array for name, array in original.items()}
    assert wrapped.keys() != original.keys()
    wrapped["module.n_averaged"] = np.zeros((), np.int64)
    config, variables = from_torch_state_dict(wrapped)
    assert_same_arrays(to_torch_state_dict(config, variables, layout), original)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_mmpretrains_names_are_read_and_those_of_its_detectors_refused(prefix):
    original = state_dict(SMALL, "sail")
    theirs = {re.sub(r"^norm\.", "norm6.", name): original[name] for name in original if not name.startswith("head")}
    theirs = {f"{prefix}backbone.{name}": array for name, array in theirs.items()}
    theirs |= {f"{prefix}head.fc.{name}": original[f"head.{name}"] for name in ("weight", "bias")}
    config, variables = from_torch_state_dict(theirs)
    assert_same_arrays(to_torch_state_dict(config, variables, "sail"), original)
    with pytest.raises(WeightsMismatch):
        from_torch_state_dict({**theirs, f"{prefix}backbone.norm4.weight": np.zeros(6, np.float32)})


@pytest.mark.parametrize("prefix", ["", "encoder.model."])
def test_names_of_timms_features_only_models_are_read(prefix):
    original = state_dict(SMALL, "timm", classifier=False)
    flat = {prefix + re.sub(r"^stages\.", "stages_", name): array for name, array in original.items()}
    config, variables = from_torch_state_dict(flat)
    assert config.num_labels == 0
    assert_same_arrays(to_torch_state_dict(config, variables, "timm"), original)


@pytest.mark.parametrize("first", ["", "student."])
def test_a_second_network_under_a_prefix_is_reported_as_unexpected(first):
    one = state_dict(SMALL, "timm")
    both = {first + name: array for name, array in one.items()} | {f"teacher.{name}": one[name] + 1 for name in one}
    for names in (both, dict(reversed(both.items()))):
        with pytest.raises(WeightsMismatch) as raised:
            from_torch_state_dict(names)
        assert not raised.value.missing and len(raised.value.unexpected) == len(one)


def test_wider_and_narrower_types_become_float32_or_stay_on_request():
    double = {name: array.astype(np.float64) for name, array in state_dict(SMALL, "sail").items()}
    for dtype, expected in ((np.float32, "float32"), (None, "float64")):
        _, variables = from_torch_state_dict(double, param_dtype=dtype)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {expected}
    brain = {name: array.astype(jnp.bfloat16) for name, array in double.items()}
    _, variables = from_torch_state_dict(brain)
    exact = brain["head.bias"].astype(np.float32)
    np.testing.assert_array_equal(variables["params"]["head"]["bias"], exact, strict=True)


def test_a_quantized_network_is_refused():
    quantized = {name: array.astype(np.int8) for name, array in state_dict(SMALL, "sail").items()}
    with pytest.raises(ValueError, match=r"not floating-point numbers: patch_embed\.proj\.weight \(int8\)"):
        from_torch_state_dict(quantized)


@pytest.mark.parametrize(
    "error", [TypeError("Got unsupported ScalarType BFloat16"), RuntimeError("Can't call numpy() on Tensor")]
)
def test_a_tensor_that_numpy_cannot_convert_is_named(error):
    class Tensor:
        shape, dtype = (3,), "torch.bfloat16"

        def __array__(self, dtype=None, copy=None):
            raise error

    with pytest.raises(ValueError, match=r"head\.bias cannot be converted .*(Got|Can't).*tensor\.detach\(\)\.cpu"):
        from_torch_state_dict({**state_dict(SMALL, "sail"), "head.bias": Tensor()})


def test_integers_of_other_models_are_not_reported_as_quantized():
    resnet = {"bn1.num_batches_tracked": np.zeros((), np.int64), "conv1.weight": np.zeros((64, 3, 7, 7), np.float32)}
    with pytest.raises(ValueError, match=r"not those of a PoolFormer: bn1\.num_batches_tracked, conv1\.weight"):
        from_torch_state_dict(resnet)
    counted = {**state_dict(SMALL, "sail"), "network.0.0.norm1.num_batches_tracked": np.zeros((), np.int64)}
    with pytest.raises(WeightsMismatch, match=r"unexpected: network\.0\.0\.norm1\.num_batches_tracked \[\]"):
        from_torch_state_dict(counted)


def test_jax_arrays_become_the_original_state_dict():
    original = state_dict(SMALL, "hf")
    config, variables = from_torch_state_dict(original)
    assert_same_arrays(to_torch_state_dict(config, jax.tree.map(jnp.asarray, variables), "hf"), original)


def test_variables_of_another_network_are_reported_with_their_paths():
    config, variables = from_torch_state_dict(state_dict(SMALL, "sail"))
    del variables["params"]["norm"]["bias"]
    variables["params"]["head"]["scale"] = np.zeros(3, np.float32)
    with pytest.raises(WeightsMismatch, match=r"(?s)missing: norm/bias \[8\].*unexpected: head/scale \[3\]"):
        to_torch_state_dict(config, variables, "sail")


@pytest.mark.parametrize("variables", [{}, {"stem": {}}, {"params": {}, "batch_stats": {}}])
def test_variables_must_have_params_and_nothing_else(variables):
    with pytest.raises(ValueError, match=r"Expected \{'params': tree\} and nothing else"):
        to_torch_state_dict(SMALL, variables, "sail")

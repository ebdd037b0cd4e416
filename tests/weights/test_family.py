"""Weights of the second paper's networks: both PyTorch layouts, what no array shows, heads, and preprocessing."""

import jax
import numpy as np
import pytest

import archives
from golden import published
from poolformer_jax import MetaFormerConfig, from_torch_state_dict, to_torch_state_dict
from poolformer_jax.network import CONSTANTS, VARIANTS, MetaFormerForImageClassification

KINDS = ("poolformerv2", "identityformer", "randformer", "convformer", "caformer")
EACH = [(home, kind) for home in ("sail", "timm") for kind in KINDS]
HEAD_EPSILON = {"sail": 1e-5, "timm": 1e-6}


def state_dict(home, kind):
    """Of a network of one block per stage, widths 8 to 64, ten labels."""
    return published.state_dict(f"family/{home}", f"{kind}_tiny")


def config_of(home, kind, **changes):
    published_size = {"depths": (1, 1, 1, 1), "hidden_sizes": (8, 16, 32, 64), "num_labels": 10}
    if kind == "randformer":
        changes = {"image_size": 64, **changes}
    if kind in ("convformer", "caformer"):
        changes = {"head_norm_epsilon": HEAD_EPSILON[home], **changes}
    variant = next(name for name in VARIANTS if name.startswith(kind))
    return MetaFormerConfig.from_variant(variant, **{**published_size, **changes})


def saved(path, home, kind, **others):
    return archives.checkpoint(path, {"state_dict": state_dict(home, kind), **others})


@pytest.mark.parametrize(("home", "kind"), EACH)
def test_both_layouts_are_read_and_come_back_bit_for_bit(home, kind):
    original, expected = state_dict(home, kind), config_of(home, kind)
    inferred = kind not in ("poolformerv2", "identityformer")
    config, variables = from_torch_state_dict(original, None if inferred else expected)
    assert config == expected
    assert (CONSTANTS in variables) == (kind == "randformer")
    back = to_torch_state_dict(config, variables, home)
    assert list(back) == list(original)
    for name, array in original.items():
        np.testing.assert_array_equal(back[name], array, strict=True)
    other = "timm" if home == "sail" else "sail"
    there = to_torch_state_dict(config, variables, other)
    assert {name: array.shape for name, array in there.items()} == published.shapes(f"family/{other}", f"{kind}_tiny")
    _, again = from_torch_state_dict(there, config)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, variables))


# The tests of the network compare every kind by default.
QUICK = (("timm", "caformer"), ("sail", "randformer"))
PARITY = [pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow) for each in EACH]


@pytest.mark.parametrize(("home", "kind"), PARITY)
def test_loaded_weights_compute_what_pytorch_computes(home, kind):
    golden = published.arrays(f"family/{home}", f"{kind}_tiny")
    config, variables = from_torch_state_dict(state_dict(home, kind), config_of(home, kind))
    with jax.enable_x64():
        variables = jax.tree.map(lambda leaf: leaf.astype(np.float64), variables)
        pixels = published.pixel_values("64x64").astype(np.float64)
        model = MetaFormerForImageClassification(config, dtype="float64")
        logits = np.asarray(jax.jit(model.apply)(variables, pixels).logits)
    expected = golden["64x64/logits"]
    assert np.abs(logits - expected).max() < 1e-9 * np.abs(expected).max()

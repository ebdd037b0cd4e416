"""An independent network agrees with the golden arrays of the second paper, and they catch every known mistake.

So the parity tests catch these mistakes too: they compare with the same arrays and allow ten times less.
"""

import json
from functools import cache

import numpy as np
import pytest

from golden import fixture_values, published
from network import metaformer_reference as reference
from network.metaformer_reference import HEAD_EPSILON, KINDS, LOUD_MISTAKES, SILENT_MISTAKES

# Of the largest value compared, or of a gradient's norm. The parity tests allow as much.
FLOAT64, FLOAT32 = 1e-9, 2e-5
EACH = [(home, kind) for home in HEAD_EPSILON for kind in KINDS]


@cache
def state_dict(home, kind):
    """Weights of the tiny network, with the authors' names."""
    state = {
        name: array.astype(np.float64) for name, array in published.state_dict(f"family/{home}", f"{kind}_tiny").items()
    }
    return reference.from_timm(state) if home == "timm" else state


def pixels(size):
    return published.pixel_values(size).transpose(0, 3, 1, 2).astype(np.float64)


def outputs(home, kind, size, mistake=None):
    return reference.outputs(state_dict(home, kind), pixels(size), kind, HEAD_EPSILON[home], mistake)


def error(actual, expected):
    return np.abs(actual - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(("home", "kind"), EACH)
def test_logits_and_stages_are_those_of_pytorch(home, kind):
    golden = published.arrays(f"family/{home}", f"{kind}_tiny")
    for size in ("64x64", "32x128", "70x93"):
        if f"{size}/logits" not in golden:  # a random matrix fixes the number of tokens
            assert (kind, size) == ("randformer", "70x93")
            continue
        stages, logits = outputs(home, kind, size)
        assert error(logits, golden[f"{size}/logits"]) < FLOAT64
        if size == "64x64":
            for number, stage in enumerate(stages):
                assert error(stage, golden[f"{size}/stage{number}/nchw"]) < FLOAT64
        for stage, expected in zip(stages, published.stages(golden, size)):
            assert error(stage.ravel()[expected.index], expected.value) < FLOAT64


@pytest.mark.parametrize(
    ("home", "kind"),
    [
        pytest.param(*pair, marks=() if pair in (("sail", "caformer"), ("sail", "randformer")) else pytest.mark.slow)
        for pair in EACH
    ],
)
def test_every_gradient_is_that_of_pytorch(home, kind):
    golden = published.arrays(f"family/{home}", f"{kind}_tiny")
    state, images, labels = state_dict(home, kind), pixels("64x64"), golden["grad/labels"]
    theirs = published.shapes(f"family/{home}", f"{kind}_tiny")
    names = reference.from_timm({name: np.array(name) for name in theirs}) if home == "timm" else {n: n for n in theirs}

    def loss(state, images):
        logits = reference.outputs(state, images, kind, HEAD_EPSILON[home])[1]
        return (np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]).mean()

    assert loss(state, images) == pytest.approx(golden["grad/loss"], rel=FLOAT64)
    for ours, name in [*names.items(), ("pixels", "pixels")]:
        if f"grad/{name}/l2_probe_index_value" not in golden:
            assert "random_matrix" in ours
            continue
        norm, expected = golden[f"grad/{name}/l2_probe_index_value"][:2]
        shape = images.shape if ours == "pixels" else theirs[str(name)]
        probe = fixture_values.uniform(f"probe/{name}", shape)
        # The derivative along the probe by a complex step, exact to rounding.
        step = 1e-30j * (probe if ours == "pixels" else probe.reshape(state[ours].shape))
        shifted = (state, images + step) if ours == "pixels" else (state | {ours: state[ours] + step}, images)
        assert abs(loss(*shifted).imag / 1e-30 - expected) < FLOAT64 * norm * np.linalg.norm(probe), name


def mistakes(table):
    return [pytest.param(kind, mistake, id=f"{kind}-{mistake}") for mistake, kinds in table.items() for kind in kinds]


@pytest.mark.parametrize(("kind", "mistake"), mistakes(LOUD_MISTAKES))
def test_the_golden_arrays_catch_in_float32(kind, mistake):
    expected = published.arrays("family/sail", f"{kind}_tiny")["32x128/logits"]
    assert error(outputs("sail", kind, "32x128", mistake)[1], expected) > 10 * FLOAT32


@pytest.mark.parametrize(("kind", "mistake"), mistakes(SILENT_MISTAKES))
def test_the_golden_arrays_catch_in_float64_only(kind, mistake):
    for home in HEAD_EPSILON:
        expected = published.arrays(f"family/{home}", f"{kind}_tiny")["64x64/logits"]
        assert 10 * FLOAT64 < error(outputs(home, kind, "64x64", mistake)[1], expected) < 1e-4


def test_dropout_in_the_wrong_place_of_the_head_moves_the_logits():
    state, mask = state_dict("sail", "caformer"), np.random.default_rng(0).integers(0, 2, (2, 256)) / 0.5
    expected, actual = (
        reference.outputs(state, pixels("64x64"), "caformer", 1e-5, mistake, mask)[1]
        for mistake in (None, "dropout before fc1")
    )
    assert error(actual, expected) > 10 * FLOAT32


VARIANTS = ("poolformerv2_s12", "identityformer_s12", "randformer_s12", "convformer_s18", "caformer_s18")


@pytest.mark.parametrize("variant", [*VARIANTS, *(f"{kind}_tiny" for kind in KINDS)])
def test_the_two_homes_have_the_same_arrays_with_other_names_and_shapes(variant):
    def listing(state):
        return [(name, array.shape) for name, array in state.items()]

    # Zero strides: the shapes alone are compared.
    blank = {name: np.broadcast_to(0.0, shape) for name, shape in published.shapes("family/sail", variant).items()}
    theirs = list(published.shapes("family/timm", variant).items())
    assert listing(reference.to_timm(blank)) == theirs
    back = reference.from_timm(reference.to_timm(blank))
    assert {name: array.shape for name, array in back.items()} == published.shapes("family/sail", variant)
    if "former_s18" in variant or variant in ("convformer_tiny", "caformer_tiny"):
        assert listing(reference.to_timm(blank, "head.norm keeps its name")) != theirs
    if variant.startswith("caformer"):
        assert listing(reference.to_timm(blank, "one shape for fc1 and fc2 in all stages")) != theirs


@pytest.mark.parametrize("variant", VARIANTS)
def test_multiply_adds_are_the_published_ones_without_norms(variant):
    counts = json.loads((published.FOLDER / "family" / "counts.json").read_text())[variant]
    shapes = published.shapes("family/sail", variant)
    assert reference.multiply_adds(shapes, 224) == counts["macs_without_norms_224"]
    assert reference.multiply_adds(shapes, 224, norms=True) == counts["macs_224"]
    if variant == "convformer_s18":  # published as 3.9 G; with norms it would be 4.0
        assert [round(counts[key] / 1e9, 1) for key in ("macs_without_norms_224", "macs_224")] == [3.9, 4.0]
    if "macs_without_norms_384" in counts:
        assert reference.multiply_adds(shapes, 384) == counts["macs_without_norms_384"]

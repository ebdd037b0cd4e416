"""An independent network agrees with the golden arrays of the second paper, and they catch every known mistake.

So the parity tests catch these mistakes too: they compare with the same arrays and allow ten times less.
"""

from functools import cache

import numpy as np
import pytest

from golden import published
from network import metaformer_reference as reference
from network.metaformer_reference import KINDS, LOUD_MISTAKES, SILENT_MISTAKES

FLOAT64, FLOAT32 = 1e-9, 2e-5  # of the largest value compared


@cache
def state_dict(kind):
    """Weights of the tiny network, with the authors' names."""
    arrays = published.state_dict("family/sail", f"{kind}_tiny")
    return {name: array.astype(np.float64) for name, array in arrays.items()}


def outputs(kind, size, mistake=None):
    pixels = published.pixel_values(size).transpose(0, 3, 1, 2).astype(np.float64)
    return reference.outputs(state_dict(kind), pixels, kind, mistake)


def error(actual, expected):
    return np.abs(actual - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_stages_are_those_of_pytorch(kind):
    golden = published.arrays("family/sail", f"{kind}_tiny")
    stages, logits = outputs(kind, "64x64")
    assert error(logits, golden["64x64/logits"]) < FLOAT64
    for number, stage in enumerate(stages):
        assert error(stage, golden[f"64x64/stage{number}/nchw"]) < FLOAT64


def mistakes(table):
    return [pytest.param(kind, mistake, id=f"{kind}-{mistake}") for mistake, kinds in table.items() for kind in kinds]


@pytest.mark.parametrize(("kind", "mistake"), mistakes(LOUD_MISTAKES))
def test_the_golden_arrays_catch_in_float32(kind, mistake):
    expected = published.arrays("family/sail", f"{kind}_tiny")["32x128/logits"]
    assert error(outputs(kind, "32x128", mistake)[1], expected) > 10 * FLOAT32


@pytest.mark.parametrize(("kind", "mistake"), mistakes(SILENT_MISTAKES))
def test_the_golden_arrays_catch_in_float64_only(kind, mistake):
    expected = published.arrays("family/sail", f"{kind}_tiny")["64x64/logits"]
    assert 10 * FLOAT64 < error(outputs(kind, "64x64", mistake)[1], expected) < 1e-4

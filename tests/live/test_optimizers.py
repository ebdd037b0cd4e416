"""timm's optimizers, its running mean of the weights, and its training still give the golden numbers."""

import importlib.util

import numpy as np
import pytest

from golden import make_optimizers
from golden.family import make_training_runs
from paths import TESTS

pytestmark = [
    pytest.mark.live,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed"),
]


@pytest.mark.parametrize("name", make_optimizers.OPTIMIZERS)
def test_twenty_steps_of_timm_are_the_golden_ones(name):
    golden = np.load(TESTS / "golden" / "optimizers.npz")
    for key, value in make_optimizers.run(name).items():
        np.testing.assert_allclose(value, golden[f"{name}/{key}"], rtol=1e-12, atol=1e-14, err_msg=key)


@pytest.mark.parametrize("name", make_training_runs.RUNS)
def test_twenty_steps_of_a_small_network_of_timm_are_the_golden_ones(name):
    with np.load(TESTS / "golden" / "family" / "training_runs.npz") as archive:
        golden = dict(zip(archive["keys"], archive["values"]))
    for key, values in make_training_runs.train(name).items():
        for index, value in enumerate(np.ravel(values)):
            assert value == pytest.approx(golden[f"{name}/{key}/{index}"], rel=1e-9), key

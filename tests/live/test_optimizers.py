"""timm's optimizers, and its running mean of the weights, still do what the golden numbers say."""

import importlib.util

import numpy as np
import pytest

from golden import make_optimizers
from paths import TESTS

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("ignore")]


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.parametrize("name", make_optimizers.OPTIMIZERS)
def test_twenty_steps_of_timm_are_the_golden_ones(name):
    golden = np.load(TESTS / "golden" / "optimizers.npz")
    for key, value in make_optimizers.run(name).items():
        np.testing.assert_allclose(value, golden[f"{name}/{key}"], rtol=1e-12, atol=1e-14, err_msg=key)

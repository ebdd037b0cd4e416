"""The network is the published one: every variant, layout, input size, ablation and gradient agrees with PyTorch.

The golden arrays are PyTorch's, in float64; tests/golden/README.md says how they were made.
"""

from functools import cache, lru_cache

import jax
import numpy as np
import pytest

from golden import published
from poolformer_jax import (
    PoolFormerConfig,
    PoolFormerForImageClassification,
    from_torch_state_dict,
    to_torch_state_dict,
)
from reference_network import MISTAKES
from reference_network import logits as reference_logits

pytestmark = pytest.mark.usefixtures("optimised")  # the largest networks, in float64
# Of the largest logit, or of the largest value of a stage. float64 differs by the order of summation alone.
TOLERANCE = {"float32": 1e-4, "float64": 1e-9}


@lru_cache(maxsize=1)  # m48 alone has 73 million parameters
def converted(layout, variant):
    return from_torch_state_dict(published.state_dict(layout, variant))


@cache  # to trace the 36 blocks of m48 takes longer than to run them
def network(config, dtype):
    return jax.jit(PoolFormerForImageClassification(config, dtype=dtype).apply)


def compare(config, variables, golden, size, dtype):
    with jax.enable_x64(dtype == "float64"):
        output = network(config, dtype)(variables, published.pixel_values(size))
        assert output.hidden_states[0].dtype == dtype
    for stage, feature_map in zip(published.stages(golden, size), output.hidden_states, strict=True):
        nchw = np.asarray(feature_map, np.float64).transpose(0, 3, 1, 2)
        assert nchw.shape == stage.shape_nchw
        assert relative_error(nchw.ravel()[stage.index], stage.value) < TOLERANCE[dtype]
        assert relative_error([nchw.mean(), nchw.std()], stage.mean_std) < TOLERANCE[dtype]
    assert relative_error(output.logits, golden[f"{size}/logits"]) < TOLERANCE[dtype]


def relative_error(actual, expected):
    return np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max()


SIZES = [(variant, size) for variant in published.VARIANTS for size in ("224x224", "160x224", "225x193")]
SIZES = [(variant, size) for variant, size in SIZES if variant == "s12" or size == "224x224"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("variant", "size"), SIZES)
@pytest.mark.parametrize("layout", published.LAYOUTS)
def test_logits_and_every_stage_are_those_of_pytorch(layout, variant, size, dtype):
    compare(*converted(layout, variant), published.arrays(layout, variant), size, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("variant", published.ABLATIONS)
def test_the_ablations_are_those_of_the_authors(variant, dtype):
    # Identity and pooling have no parameters and both norms have the same: the weights do not tell, so the config does.
    config, variables = from_torch_state_dict(
        published.state_dict("sail", variant), config=PoolFormerConfig.from_variant(variant)
    )
    compare(config, variables, published.arrays("sail", variant), "224x224", dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-9)])
@pytest.mark.parametrize("layout", ["hf", "sail"])
def test_every_gradient_is_that_of_pytorch(layout, dtype, tolerance):
    golden = published.arrays(layout, "s12")
    with jax.enable_x64(dtype == "float64"):
        config, variables = converted(layout, "s12")
        model = PoolFormerForImageClassification(config, dtype=dtype)
        variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)

        def loss(variables):
            return model.apply(variables, published.pixel_values("224x224"), labels=golden["grad/labels"]).loss

        value, gradient = jax.jit(jax.value_and_grad(loss))(variables)
        gradient = to_torch_state_dict(config, jax.device_get(gradient), layout)
    assert relative_error(value, golden["grad/loss"]) < tolerance
    # A norm1 bias has no effect on the loss: its gradient is nothing but the rounding of much larger numbers.
    rounding = np.finfo(dtype).eps * max(golden[f"grad/{name}/l2_index_value"][0] for name in gradient)
    for name, array in gradient.items():
        norm, index_value = golden[f"grad/{name}/l2_index_value"][0], golden[f"grad/{name}/l2_index_value"][1:]
        index, expected = np.split(index_value, 2)
        actual = np.asarray(array, np.float64)
        assert abs(np.linalg.norm(actual) - norm) < tolerance * norm + rounding, name
        assert np.abs(actual.ravel()[index.astype(int)] - expected).max() < tolerance * norm + rounding, name


def test_a_mistake_free_network_of_forty_lines_agrees_too():
    assert reference_error(None) < TOLERANCE["float64"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_golden_arrays_would_catch(mistake):
    assert reference_error(mistake) > 10 * TOLERANCE["float64"]


def reference_error(mistake):
    golden = published.arrays("sail", "s12")["160x224/logits"]
    with jax.enable_x64():
        state = {name: value.astype("float64") for name, value in published.state_dict("sail", "s12").items()}
        pixels = published.pixel_values("160x224").astype("float64")
        return relative_error(jax.jit(reference_logits, static_argnums=2)(state, pixels, mistake), golden)

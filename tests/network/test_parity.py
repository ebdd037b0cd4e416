"""The network is the published one: every variant, layout, input size, ablation and gradient agrees with PyTorch.

The golden arrays are PyTorch's, in float64; tests/golden/README.md says how they were made.
"""

from functools import lru_cache

import jax
import numpy as np
import pytest

from golden import published
from network.outputs import outputs, relative_error
from poolformer_jax import (
    PoolFormerConfig,
    PoolFormerForImageClassification,
    from_torch_state_dict,
    to_torch_state_dict,
)
from reference_network import MISTAKES, logits as reference_logits

# One representative of each promise runs by default; the others are slow.
pytestmark = pytest.mark.usefixtures("optimised")  # large networks, in float64
slow = pytest.mark.slow
# Of the largest logit, or of the largest value of a stage. float64 differs by the order of summation alone.
TOLERANCE = {"float32": 1e-4, "float64": 1e-9}


@lru_cache(maxsize=1)  # m48 alone has 73 million parameters
def converted(layout, variant):
    return from_torch_state_dict(published.state_dict(layout, variant))


def compare(config, variables, golden, size, dtype):
    with jax.enable_x64(dtype == "float64"):
        pixels = published.pixel_values(size)
        hidden_states, logits = outputs(config, variables, pixels, dtype, head_order="norm_pool")
    assert hidden_states[0].dtype == dtype
    for stage, feature_map in zip(published.stages(golden, size), hidden_states, strict=True):
        nchw = np.asarray(feature_map, np.float64).transpose(0, 3, 1, 2)
        assert nchw.shape == stage.shape_nchw
        assert relative_error(nchw.ravel()[stage.index], stage.value) < TOLERANCE[dtype]
        assert relative_error([nchw.mean(), nchw.std()], stage.mean_std) < TOLERANCE[dtype]
    assert relative_error(logits, golden[f"{size}/logits"]) < TOLERANCE[dtype]


LARGER = published.VARIANTS[1:]
NETWORKS = [
    # Sides that are no multiples of the strides.
    *((layout, "s12", "225x193", "float64") for layout in published.LAYOUTS),
    ("timm", "s12", "225x193", "float32"),
    *(pytest.param("timm", "s12", size, "float64", marks=slow) for size in ("224x224", "160x224")),
    *(pytest.param(layout, size, "224x224", "float64", marks=slow) for layout in published.LAYOUTS for size in LARGER),
]


@pytest.mark.parametrize(("layout", "variant", "size", "dtype"), NETWORKS)
def test_logits_and_every_stage_are_those_of_pytorch(layout, variant, size, dtype):
    compare(*converted(layout, variant), published.arrays(layout, variant), size, dtype)


@slow
@pytest.mark.parametrize("variant", published.ABLATIONS)
def test_the_ablations_are_those_of_the_authors(variant):
    # Identity and pooling have no parameters and both norms have the same: the weights do not tell, so the config does.
    config, variables = from_torch_state_dict(
        published.state_dict("sail", variant), config=PoolFormerConfig.from_variant(variant)
    )
    compare(config, variables, published.arrays("sail", variant), "224x224", "float64")


@slow
@pytest.mark.parametrize(("layout", "dtype"), [("hf", "float32"), ("sail", "float64")])
def test_every_gradient_is_that_of_pytorch(layout, dtype):
    tolerance = TOLERANCE[dtype]  # of the gradient's norm
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


@slow
def test_an_independent_network_in_forty_lines_agrees_too():
    assert reference_error(None) < TOLERANCE["float64"]


@slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_golden_arrays_would_catch(mistake):
    assert reference_error(mistake) > 10 * TOLERANCE["float64"]


def reference_error(mistake):
    golden = published.arrays("sail", "s12")["160x224/logits"]
    with jax.enable_x64():
        state = {name: value.astype("float64") for name, value in published.state_dict("sail", "s12").items()}
        pixels = published.pixel_values("160x224").astype("float64")
        return relative_error(jax.jit(reference_logits, static_argnums=2)(state, pixels, mistake), golden)

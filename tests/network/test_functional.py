"""The arithmetic that ports get wrong, each promise shown to fail for the plausible neighbour."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.test_util import check_grads

from poolformer_jax import PoolFormerConfig, PoolFormerForImageClassification
from poolformer_jax.network import functional
from poolformer_jax.network.variants import VARIANTS


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def pooled_by_hand(x, size):
    x = np.asarray(x)
    _, height, width, _ = x.shape
    out = np.zeros_like(x)
    for i in range(height):
        for j in range(width):
            rows = slice(max(i - size // 2, 0), i + size // 2 + 1)
            columns = slice(max(j - size // 2, 0), j + size // 2 + 1)
            out[:, i, j] = x[:, rows, columns].mean((1, 2))
    return out


@pytest.mark.parametrize("shape", [(2, 7, 5, 3), (1, 1, 1, 4), (1, 1, 6, 2), (1, 2, 2, 2)])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_pooling_counts_only_pixels_inside_the_image(shape, size):
    x = normal(*shape)
    np.testing.assert_allclose(functional.average_pool(x, size), pooled_by_hand(x, size), atol=1e-6)


def test_pooling_a_constant_leaves_nothing():
    constant = jnp.broadcast_to(jnp.array([0.1, -3.0, 7.0]), (1, 6, 6, 3))
    np.testing.assert_allclose(functional.pooling_mixer(constant, 3), 0, atol=1e-6)
    counting_the_padding = nn.avg_pool(constant, (3, 3), padding="SAME", count_include_pad=True) - constant
    assert np.abs(counting_the_padding).max() > 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pooling_keeps_the_type_and_the_accuracy_of_its_input(dtype):
    x = jnp.asarray(normal(2, 8, 8, 4), dtype)
    pooled = functional.average_pool(x, 3)
    assert pooled.dtype == dtype
    exact = pooled_by_hand(np.asarray(x, np.float64), 3)
    assert np.abs(np.asarray(pooled, np.float64) - exact).max() < 4 * jnp.finfo(dtype).eps


def test_the_gradient_of_pooling_is_that_of_its_definition():
    x = normal(1, 5, 6, 2)
    check_grads(
        lambda x: functional.pooling_mixer(jnp.asarray(x), 3), (x,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2
    )
    dense = jax.jacobian(lambda x: functional.average_pool(x, 3))(x).reshape(x.size, x.size)
    columns = [pooled_by_hand(np.eye(x.size, dtype=np.float32)[i].reshape(x.shape), 3).ravel() for i in range(x.size)]
    np.testing.assert_allclose(dense, np.stack(columns, axis=1), atol=1e-6)


def test_group_norm_has_one_group_and_centres_before_squaring():
    # A mean of 1000 costs E[x²] - E[x]² all its digits in float32.
    x = normal(2, 6, 6, 32) + 1000
    exact = np.asarray(x, np.float64)
    exact -= exact.mean((1, 2, 3), keepdims=True)
    exact /= np.sqrt((exact**2).mean((1, 2, 3), keepdims=True) + 1e-5)
    ones, zeros = jnp.ones(32), jnp.zeros(32)
    np.testing.assert_allclose(functional.group_norm(x, ones, zeros), exact, atol=1e-3)
    flax_default = nn.GroupNorm().apply({"params": {"scale": ones, "bias": zeros}}, x)
    assert np.abs(flax_default - exact).max() > 0.1


def test_norms_compute_their_statistics_in_float32():
    x = jnp.asarray(normal(1, 16, 16, 8) + 100, jnp.bfloat16)
    exact = functional.group_norm(x.astype(jnp.float32), jnp.ones(8), jnp.zeros(8))
    half = functional.group_norm(x, jnp.ones(8), jnp.zeros(8))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), exact, atol=2e-2)


def test_gelu_is_the_exact_one():
    x = jnp.linspace(-4, 4, 101)
    exact = 0.5 * x * (1 + jax.scipy.special.erf(x / np.sqrt(2)))
    np.testing.assert_allclose(functional.ACTIVATIONS["gelu"](x), exact, atol=1e-6)
    assert np.abs(nn.gelu(x) - exact).max() > 1e-4


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    x = jnp.ones((20_000, 2, 2, 1))
    out = np.asarray(functional.drop_path(jax.random.key(0), x, 0.25))
    per_sample = out.reshape(len(out), -1)
    assert (per_sample == per_sample[:, :1]).all()
    np.testing.assert_allclose(np.unique(out), [0, 1 / 0.75], rtol=1e-6)
    # Five standard deviations of the mean of 20,000 draws.
    assert abs(out.mean() - 1) < 5 * np.sqrt(0.25 / 0.75 / 20_000)


def test_drop_path_grows_linearly_over_all_blocks():
    rates = functional.drop_path_rates(0.1, (2, 2, 6, 2))
    np.testing.assert_allclose(np.concatenate(rates), [0.1 * block / 11 for block in range(12)])
    assert [len(stage) for stage in rates] == [2, 2, 6, 2]


@pytest.mark.parametrize(
    ("variant", "value"), [("s12", 1e-5), ("s24", 1e-5), ("s36", 1e-6), ("m36", 1e-6), ("m48", 1e-6)]
)
def test_layer_scale_starts_where_the_authors_start_it(variant, value):
    assert VARIANTS[variant]["layer_scale_init_value"] == value
    assert PoolFormerConfig.from_variant(variant).layer_scale_init_value == value


FORMULAS = {
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "leaky_relu": lambda x: np.where(x < 0, x / 100, x),
    "linear": lambda x: x,
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "relu6": lambda x: np.clip(x, 0, 6),
    "sqrtsoftplus": lambda x: np.sqrt(np.log1p(np.exp(x))),
    "swish": lambda x: x / (1 + np.exp(-x)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_activations_are_those_of_their_names_in_transformers(name):
    x = np.linspace(-12, 12, 97)
    activation = functional.ACTIVATIONS[name]
    np.testing.assert_allclose(activation(jnp.float32(x)), FORMULAS[name](x), rtol=2e-6, atol=2e-6)
    assert activation(jnp.bfloat16(x)).dtype == jnp.bfloat16


def test_shape_annotations_are_checked_while_tests_run():
    with pytest.raises(jaxtyping.TypeCheckError, match="scale"):
        functional.layer_norm(jnp.zeros((2, 3)), scale=jnp.ones(4))


def test_pixels_that_are_not_normalised_are_refused():
    model = PoolFormerForImageClassification(PoolFormerConfig())
    with pytest.raises(ValueError, match="has dtype uint8"):
        jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.uint8))


def test_a_linen_module_names_what_loads_weights():
    with pytest.raises(ValueError, match=r"holds no weights. Expected load_pretrained\(source\)"):
        PoolFormerForImageClassification.from_pretrained("sail/poolformer_s12")

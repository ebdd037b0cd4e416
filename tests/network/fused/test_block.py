"""The fused blocks compute what the blocks as the paper writes them compute, and no less precisely."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poolformer_jax import PoolFormerForImageClassification
from poolformer_jax.network import functional
from poolformer_jax.network.fused import block, cpu_batching
from poolformer_jax.network.fused.statistics import moments_of
from selection import slow_after
from small_networks import TWO_STAGES, distance, random_variables

CONFIG = dataclasses.replace(TWO_STAGES, depths=(1, 1), drop_path_rate=0.4, layer_scale_init_value=0.5)
PIXELS = np.random.default_rng(0).normal(size=(3, 24, 32, 3)).astype(np.float32)
LABELS = np.array([0, 3, 1])


def randomised(variables, seed=1):
    """Moves every parameter away from the ones and zeros that hide mistakes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32), variables)


def loss(variables, pixels=PIXELS, *, fused, dtype=jnp.float32, config=CONFIG):
    model = PoolFormerForImageClassification(config, dtype=dtype, fused=fused)
    return model.apply(variables, pixels, LABELS, train=True, rngs={"dropout": jax.random.key(7)}).loss


@pytest.fixture(scope="module")
def variables():
    return random_variables(CONFIG)[1]


def test_both_paths_have_the_same_parameters_and_initial_values():
    trees = [
        jax.jit(PoolFormerForImageClassification(CONFIG, fused=fused).init)(jax.random.key(3), PIXELS)
        for fused in (False, True)
    ]
    jax.tree.map(np.testing.assert_array_equal, *trees)


@pytest.mark.parametrize(
    "config",
    slow_after(
        1,
        [
            dataclasses.replace(CONFIG, hidden_sizes=(8, cpu_batching.SAVE_HIDDEN_CHANNELS)),
            dataclasses.replace(CONFIG, use_layer_scale=False, pool_size=5, hidden_act="silu"),
        ],
    ),
    ids=["hidden layer recomputed, then saved", "another window and activation"],
)
def test_loss_and_gradients_are_those_of_the_plain_blocks(config):
    variables = random_variables(config)[1]
    (plain, plain_gradient), (fast, fast_gradient) = (
        jax.jit(jax.value_and_grad(partial(loss, fused=fused, config=config)))(variables) for fused in (False, True)
    )
    np.testing.assert_allclose(fast, plain, rtol=1e-5)
    largest = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(plain_gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), fast_gradient, plain_gradient)


@pytest.mark.slow  # compiles gradients of gradients
def test_gradients_of_gradients_in_microbatches_are_those_of_the_plain_blocks(variables, monkeypatch):
    monkeypatch.setattr(cpu_batching, "MICROBATCH_BYTES", 2**11)

    def gradient_norm(variables, fused):
        gradient = jax.grad(partial(loss, fused=fused))(variables)
        return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient))

    plain, fast = (jax.jit(jax.grad(partial(gradient_norm, fused=fused)))(variables) for fused in (False, True))
    largest = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * largest), fast, plain)


@pytest.mark.slow  # compiles three networks with their gradients
def test_bfloat16_is_no_less_accurate_than_the_plain_blocks():
    """Also for a bright image, whose large mean the plain blocks subtract before they pool."""
    config = dataclasses.replace(CONFIG, depths=(2, 1))
    variables = randomised(jax.jit(PoolFormerForImageClassification(config).init)(jax.random.key(0), PIXELS))
    exact, plain, fast = (
        jax.jit(jax.grad(partial(loss, fused=fused, dtype=dtype, config=config)))
        for fused, dtype in ((False, jnp.float32), (False, jnp.bfloat16), (True, jnp.bfloat16))
    )
    for brightness in (0, 30):
        arguments = variables, PIXELS + np.float32(brightness)
        assert distance(fast(*arguments), exact(*arguments)) <= distance(plain(*arguments), exact(*arguments))


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "hidden_layers"), [(8, 0), (cpu_batching.SAVE_HIDDEN_CHANNELS, 1)])
def test_the_forward_pass_saves_the_hidden_layer_only_with_many_channels(channels, hidden_layers):
    hidden = channels + 1
    x = jnp.ones((2, 6, 6, channels), jnp.bfloat16)
    weights = block.MlpWeights(
        jnp.ones((channels, hidden)), jnp.ones(hidden), jnp.ones((hidden, channels)), jnp.ones(channels)
    )
    mlp = partial(block.mlp_residual, functional.gelu)
    _, vjp = jax.vjp(mlp, x, moments_of(x), weights, jnp.ones(2))
    saved = [leaf.shape[-1] for leaf in jax.tree.leaves(vjp) if leaf.ndim == 4]
    assert sorted(saved) == [channels] * 2 + [hidden] * hidden_layers


def test_moments_are_those_of_the_map_even_if_the_branch_moves_its_mean():
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(2, 7, 9, 8)), jnp.float32)
    weights = block.MlpWeights(jnp.zeros((8, 32)), jnp.zeros(32), jnp.zeros((32, 8)), jnp.full(8, 3.0))
    y, moments = block.mlp_residual(functional.gelu, x, moments_of(x), weights, jnp.ones(2))
    exact = np.asarray(y, np.float64)
    np.testing.assert_allclose(moments.mean, exact.mean((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(moments.variance, exact.var((1, 2, 3)), rtol=5e-5)


def test_an_image_of_one_colour_stays_finite(variables):
    one_colour = np.full_like(PIXELS, 100)
    value, gradient = jax.jit(jax.value_and_grad(partial(loss, fused=True)))(variables, one_colour)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_gelu_in_bfloat16_is_the_exact_one_within_its_rounding():
    x = jnp.linspace(-9, 9, 4001, dtype=jnp.bfloat16)
    wide = np.asarray(x, np.float32)
    exact = np.asarray(jax.nn.gelu(wide, approximate=False))
    error = np.abs(np.asarray(functional.gelu(x), np.float32) - exact)
    assert np.all(error <= 2.0**-8 * np.abs(exact) + 3e-5)
    slope = np.asarray(jax.vmap(jax.grad(functional.gelu))(x), np.float32)
    exact_slope = np.asarray(jax.vmap(jax.grad(functional.gelu))(wide))
    assert np.max(np.abs(slope - exact_slope)) < 2.0**-8

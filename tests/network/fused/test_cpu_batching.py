"""Microbatches, as a CPU computes them, change no result: neither maps nor sums over images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from poolformer_jax.network import functional
from poolformer_jax.network.fused import block, cpu_batching
from poolformer_jax.network.fused.statistics import moments_of

RNG = np.random.default_rng(0)
BATCH, CHANNELS, HIDDEN = 6, 8, 24


def random(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


X = random(BATCH, 5, 6, CHANNELS)
WEIGHTS = block.MlpWeights(random(CHANNELS, HIDDEN) / 3, random(HIDDEN), random(HIDDEN, CHANNELS) / 5, random(CHANNELS))
KEEP = jnp.array([1.0, 0.0, 2.0, 1.0, 1.0, 0.5])


def branches(x, gain, weights):
    moments = moments_of(x)
    y, moments = block.pooling_residual(3, x, moments, gain, KEEP)
    y, moments = block.mlp_residual(functional.gelu, y, moments, weights, KEEP)
    return jnp.sum(jnp.sin(y)) + jnp.sum(moments.mean * moments.variance)


@pytest.fixture
def microbatched(monkeypatch):
    """Computes two images at a time."""
    monkeypatch.setattr(cpu_batching, "MICROBATCH_BYTES", 2 * X[0].nbytes)


@pytest.fixture
def elsewhere(monkeypatch):
    """Runs the default passes, as on a platform without special ones."""
    jax.clear_caches()  # of programs traced for this platform
    monkeypatch.setattr(lax, "platform_dependent", lambda *arguments, default, **_: default(*arguments))


@pytest.mark.parametrize(("limit", "count"), [(1, 1), (2, 2), (4, 3), (5, 3), (6, 6), (100, 6)])
def test_a_microbatch_is_the_largest_divisor_of_the_batch_that_fits(monkeypatch, limit, count):
    monkeypatch.setattr(cpu_batching, "MICROBATCH_BYTES", limit * X[0].nbytes)
    assert cpu_batching.microbatch_size(X) == count


@pytest.fixture(params=[CHANNELS, CHANNELS + 1], ids=["hidden layer saved", "hidden layer recomputed"])
def save_hidden_channels(request, monkeypatch):
    """The width from which on the hidden layer is saved."""
    monkeypatch.setattr(cpu_batching, "SAVE_HIDDEN_CHANNELS", request.param)


@pytest.mark.usefixtures("save_hidden_channels")
def test_a_block_in_microbatches_has_the_same_value_and_gradients(request):
    arguments = (X, random(CHANNELS), WEIGHTS)
    block = jax.value_and_grad(branches, argnums=(0, 1, 2))
    request.getfixturevalue("microbatched")
    assert "scan" in str(jax.make_jaxpr(block)(*arguments))
    value, gradients = jax.jit(block)(*arguments)
    request.getfixturevalue("elsewhere")
    assert "scan" not in str(jax.make_jaxpr(block)(*arguments))
    plain_value, plain = jax.jit(block)(*arguments)
    np.testing.assert_allclose(value, plain_value, rtol=1e-5)
    for fast, exact in zip(jax.tree.leaves(gradients), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(fast, exact, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize(("c", "d"), [(3, 8), (8, 3)])
def test_kernel_gradients_are_sums_over_all_positions(c, d):
    x, dy = random(2, 3, 4, c), random(2, 3, 4, d)
    exact = jnp.einsum("bhwc,bhwd->cd", x, dy)
    np.testing.assert_allclose(cpu_batching.dense_kernel_gradient(x, dy, jnp.float32), exact, rtol=1e-5, atol=1e-5)

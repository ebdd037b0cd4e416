"""Grouping pixels to fill a TPU's lanes changes the layout of feature maps, not their numbers.

A TPU's passes are plain XLA, so these tests run them on this machine.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from poolformer_jax.network import functional
from poolformer_jax.network.fused import block, tpu_layout
from poolformer_jax.network.fused.statistics import moments_of
from selection import slow_after

RNG = np.random.default_rng(0)


def random(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


@pytest.fixture
def on_tpu(monkeypatch):
    """Runs the passes for TPUs on this machine, with groups also in float32."""
    monkeypatch.setattr(tpu_layout, "group_size", lambda width, channels, dtype: tpu_layout.LANES // channels)
    monkeypatch.setattr(
        lax, "platform_dependent", lambda *arguments, tpu=None, default, **_: (tpu or default)(*arguments)
    )


def test_only_narrow_16_bit_maps_whose_rows_divide_are_grouped():
    assert tpu_layout.group_size(56, 64, jnp.bfloat16) == 2
    assert tpu_layout.group_size(56, 32, jnp.bfloat16) == 4
    for width, channels, dtype in (
        (57, 64, jnp.bfloat16),
        (56, 96, jnp.bfloat16),
        (28, 128, jnp.bfloat16),
        (14, 320, jnp.bfloat16),
        (56, 64, jnp.float32),
        (224, 3, jnp.bfloat16),
    ):
        assert tpu_layout.group_size(width, channels, dtype) == 1


@pytest.mark.parametrize("pool_size", [3, 5])
@pytest.mark.parametrize("pixels", [2, 4])
@pytest.mark.parametrize("name", ["pooling_mixer", "pooling_mixer_transpose"])
def test_pooling_and_its_gradient_in_groups(name, pixels, pool_size):
    x = random(2, 7, 8, 3)
    grouped = getattr(tpu_layout, name)(pixels, tpu_layout.group_pixels(x, pixels), pool_size)
    exact = getattr(functional, name)(x, pool_size)
    np.testing.assert_allclose(tpu_layout.ungroup_pixels(grouped, pixels), exact, atol=1e-5)


@pytest.mark.parametrize("pool_size", [3, 5])
def test_the_transpose_is_the_gradient_of_pooling(pool_size):
    x, dy = random(2, 6, 5, 3), random(2, 6, 5, 3)
    _, vjp = jax.vjp(partial(functional.pooling_mixer, pool_size=pool_size), x)
    np.testing.assert_allclose(functional.pooling_mixer_transpose(dy, pool_size), vjp(dy)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("width", "channels", "kernel", "stride", "padding"),
    slow_after(
        2,
        [
            (32, (3, 64), 7, 4, 2),  # the stem: groups in its output
            (16, (64, 128), 3, 2, 1),  # the downsampling: groups in its input
            (16, (32, 64), 3, 2, 1),  # both
            (16, (64, 64), 3, 1, 1),
            (16, (64, 128), 5, 2, 0),  # the last column of pixels reaches no window
        ],
    ),
)
def test_convolutions_in_groups(on_tpu, monkeypatch, width, channels, kernel, stride, padding):
    monkeypatch.setattr(tpu_layout, "group_size", lambda w, c, dtype: 1 if 128 % c or w % (128 // c) else 128 // c)
    x, k = random(2, 9, width, channels[0]), random(kernel, kernel, *channels)
    arguments = {"window_strides": (stride,) * 2, "padding": [(padding, padding)] * 2}
    plain = partial(lax.conv_general_dilated, **arguments, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    grouped = partial(tpu_layout.convolve, stride=stride, padding=padding)
    assert "reshape" in str(jax.make_jaxpr(grouped)(x, k))  # it is the grouped one
    np.testing.assert_allclose(grouped(x, k), plain(x, k), atol=1e-3)
    dy = random(*plain(x, k).shape)
    exact = jax.vjp(plain, x, k)[1](dy)
    of_kernel = tpu_layout.convolve_gradient(x, dy, k.shape, stride, padding)
    for gradient, expected in zip((*jax.vjp(grouped, x, k)[1](dy), of_kernel), (*exact, exact[1]), strict=True):
        np.testing.assert_allclose(gradient, expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"), [(9, 7, 4, 2), (8, 3, 2, 1), (7, 3, 2, 0), (6, 4, 3, 2)]
)
def test_a_convolution_kernels_gradient_is_summed_in_float32(size, kernel, stride, padding):
    x, k = random(2, size, size + 1, 3), random(kernel, kernel, 3, 5)
    y, vjp = jax.vjp(lambda k: tpu_layout.convolve(x, k, stride, padding), k)
    dy = random(*y.shape)
    found = tpu_layout.convolve_gradient(x, dy, k.shape, stride, padding)
    np.testing.assert_allclose(found, vjp(dy)[0], atol=1e-4)
    narrow = tpu_layout.convolve_gradient(x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16), k.shape, stride, padding)
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, found, atol=0.05 * np.abs(found).max())


def branches(x, gain, weights, keep):
    moments = moments_of(x)
    y, moments = block.pooling_residual(3, x, moments, gain, keep)
    y, moments = block.mlp_residual(functional.gelu, y, moments, weights, keep)
    return jnp.sum(jnp.sin(y)) + jnp.sum(moments.mean * moments.variance)


def test_a_block_in_groups_has_the_same_value_and_gradients(request):
    c, hidden = 64, 96
    x = random(3, 5, 6, c)
    weights = block.MlpWeights(random(c, hidden) / 8, random(hidden), random(hidden, c) / 10, random(c))
    arguments = (x, random(c), weights)

    def value_and_gradients():
        keep = jnp.array([1.0, 0.0, 2.0])
        return jax.jit(jax.value_and_grad(partial(branches, keep=keep), argnums=(0, 1, 2)))(*arguments)

    plain_value, plain = value_and_gradients()
    request.getfixturevalue("on_tpu")
    value, gradients = value_and_gradients()
    np.testing.assert_allclose(value, plain_value, rtol=1e-4)
    for fast, exact in zip(jax.tree.leaves(gradients), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(fast, exact, atol=1e-4 * np.abs(exact).max())


def test_pooling_in_groups_rounds_bfloat16_no_more_than_the_plain_one():
    x = random(2, 8, 8, 16, dtype=jnp.bfloat16)
    exact = functional.pooling_mixer_transpose(x.astype(jnp.float32), 3)
    error = lambda y: float(jnp.linalg.norm(y.astype(jnp.float32) - exact))  # noqa: E731
    grouped = tpu_layout.ungroup_pixels(tpu_layout.pooling_mixer_transpose(4, tpu_layout.group_pixels(x, 4), 3), 4)
    assert error(grouped) < error(functional.pooling_mixer_transpose(x, 3))

"""The depthwise convolution for CPUs is XLA's: its values, and its gradients by map and kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poolformer_jax.network.functional import depthwise_convolution
from poolformer_jax.network.fused import convolve_depthwise


def value_and_gradients(convolution, x, kernel, dy):
    y, gradients = jax.vjp(convolution, x, kernel)
    return y, *gradients(dy)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 9, 11, 36),  # sides that are no multiples of a tile; three parts of the channels
        pytest.param((1, 7, 7, 256), marks=pytest.mark.slow),  # two tiles of channels
        pytest.param((3, 14, 15, 12), marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_are_those_of_xla(shape, dtype):
    with jax.enable_x64(dtype == "float64"):
        rng = np.random.default_rng(0)
        x, dy = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2))
        kernel = jnp.asarray(rng.standard_normal((7, 7, 1, shape[-1])), "float64" if dtype == "float64" else "float32")
        found = jax.jit(value_and_gradients, static_argnums=0)(convolve_depthwise, x, kernel, dy)
        exact = [np.asarray(array, "float64") for array in (x, kernel, dy)]
    with jax.enable_x64():
        expected = jax.jit(value_and_gradients, static_argnums=0)(depthwise_convolution, *exact)
    for one, other, given in zip(found, expected, (x, x, kernel), strict=True):
        assert one.dtype == given.dtype
        rounding = float(jnp.finfo(dtype).eps) * float(np.abs(other).max())
        np.testing.assert_allclose(np.asarray(one, "float64"), other, rtol=0, atol=8 * rounding)

"""The passes of self-attention for TPUs compute what the plain ones do: values, and gradients by map and kernel."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poolformer_jax.network.fused.self_attention import attend_by_kernel, attend_on_tpu, attend_plainly

HEAD_DIM = 8


def value_and_gradients(attend, dtype):
    with jax.enable_x64(dtype == "float64"):
        rng = np.random.default_rng(0)
        x, dy = (jnp.asarray(rng.standard_normal((2, 3, 5, 16)), dtype) for _ in range(2))
        kernel = jnp.asarray(rng.standard_normal((16, 48)), "float64" if dtype == "float64" else "float32")

        @jax.jit
        def run(x, kernel, dy):
            y, gradients = jax.vjp(lambda x, kernel: attend(x, kernel, HEAD_DIM), x, kernel)
            return y, *gradients(dy)

        found = run(x, kernel, dy)
    assert [array.dtype for array in found] == [x.dtype, x.dtype, kernel.dtype]
    return [np.asarray(array, "float64") for array in found]


@pytest.mark.parametrize("attend", [attend_on_tpu, partial(attend_by_kernel, kernels=None)])
def test_values_and_gradients_are_exact_in_float64(attend):
    for one, other in zip(value_and_gradients(attend, "float64"), value_and_gradients(attend_plainly, "float64")):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * np.abs(other).max())


def test_bfloat16_is_as_close_to_float64_as_the_plain_passes():
    def distances(attend):
        pairs = zip(value_and_gradients(attend, "bfloat16"), value_and_gradients(attend_plainly, "float64"))
        return [np.linalg.norm(one - exact) / np.linalg.norm(exact) for one, exact in pairs]

    for one, other in zip(distances(attend_on_tpu), distances(attend_plainly)):
        assert one < 1.1 * other

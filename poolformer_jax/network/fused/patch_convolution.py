"""The convolution at the start of a stage, with a custom gradient rule.

Its parameters are float32 and are cast to the map's type. JAX's default rule rounds their gradients to that type
before the all-reduce over the devices of a mesh. This rule sums them in float32 over all pixels and devices, and XLA
reduces them together with all other gradients.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from poolformer_jax.network.functional import over_channels
from poolformer_jax.network.fused import tpu_layout
from poolformer_jax.network.fused.sharding_types import partition_spec, with_auto_sharding

_Map = Float[Array, "b h w c"]
_Kernel = Float[Array, "kh kw c d"]
_Output = Float[Array, "b h2 w2 d"]


def convolve(x: _Map, kernel: _Kernel, bias: Float[Array, " d"], stride: int, padding: int) -> _Output:
    """A convolution with its bias, in the map's type.

    It has no forward-mode derivative; `convolve_with_default_gradient` has one.

    Args:
        x: feature maps, or pixels.
        kernel: float32.
        bias: float32.
        stride: pixels from one window to the next.
        padding: zeros around the map, on every side.
    """
    specs = PartitionSpec(*partition_spec(x)[:3], partition_spec(kernel)[3])
    return with_auto_sharding(partial(_convolve, stride, padding), x, kernel, bias, specs=specs)


def convolve_with_default_gradient(
    x: _Map, kernel: _Kernel, bias: Float[Array, " d"], stride: int, padding: int
) -> _Output:
    """`convolve` with JAX's default derivatives."""
    y = tpu_layout.convolve(x, kernel.astype(x.dtype), stride, padding)
    return y + over_channels(bias, y)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolve(stride: int, padding: int, x: _Map, kernel: _Kernel, bias: Float[Array, " d"]) -> _Output:
    return convolve_with_default_gradient(x, kernel, bias, stride, padding)


def _forward(
    stride: int, padding: int, x: _Map, kernel: _Kernel, bias: Float[Array, " d"]
) -> tuple[_Output, tuple[_Map, _Kernel]]:
    return _convolve(stride, padding, x, kernel, bias), (x, kernel)


def _backward(
    stride: int, padding: int, residuals: tuple[_Map, _Kernel], dy: _Output
) -> tuple[_Map, _Kernel, Float[Array, " d"]]:
    x, kernel = residuals
    _, vjp = jax.vjp(lambda x: tpu_layout.convolve(x, kernel.astype(x.dtype), stride, padding), x)
    dkernel = tpu_layout.convolve_gradient(x, dy, kernel.shape, stride, padding)
    return *vjp(dy), dkernel.astype(kernel.dtype), jnp.sum(dy, (0, 1, 2), kernel.dtype)


_convolve.defvjp(_forward, _backward)

"""The convolution at the start of a stage, with a gradient rule of its own.

Its parameters are float32 and multiplied in the map's type. JAX's own rule rounds their gradients to that type before
the devices of a mesh add theirs up. Here they are summed in float32 from the first pixel to the last device, and
exchanged together with all other gradients.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from poolformer_jax import lanes

_Map = Float[Array, "b h w c"]
_Kernel = Float[Array, "kh kw c d"]
_Output = Float[Array, "b h2 w2 d"]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def convolve(x: _Map, kernel: _Kernel, bias: Float[Array, " d"], stride: int, padding: int) -> _Output:
    """A convolution with its bias, in the map's type. It has no forward-mode derivative; `convolve_plainly` has one.

    Args:
        x: feature maps, or pixels.
        kernel: float32.
        bias: float32.
        stride: pixels from one window to the next.
        padding: zeros around the map, on every side.
    """
    return convolve_plainly(x, kernel, bias, stride, padding)


def convolve_plainly(x: _Map, kernel: _Kernel, bias: Float[Array, " d"], stride: int, padding: int) -> _Output:
    """`convolve` with JAX's own derivatives."""
    return lanes.convolve(x, kernel.astype(x.dtype), stride, padding) + bias.astype(x.dtype)


def _forward(
    x: _Map, kernel: _Kernel, bias: Float[Array, " d"], stride: int, padding: int
) -> tuple[_Output, tuple[_Map, _Kernel]]:
    return convolve(x, kernel, bias, stride, padding), (x, kernel)


def _backward(
    stride: int, padding: int, residuals: tuple[_Map, _Kernel], dy: _Output
) -> tuple[_Map, _Kernel, Float[Array, " d"]]:
    x, kernel = residuals
    _, vjp = jax.vjp(lambda x: lanes.convolve(x, kernel.astype(x.dtype), stride, padding), x)
    dkernel = lanes.convolve_gradient(x, dy, kernel.shape, stride, padding)
    return *vjp(dy), dkernel.astype(kernel.dtype), jnp.sum(dy, (0, 1, 2), kernel.dtype)


convolve.defvjp(_forward, _backward)

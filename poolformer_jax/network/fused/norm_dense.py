"""The start of a sep_conv mixer, up to its convolution, with a gradient rule, for the kernels on a TPU."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from poolformer_jax.network import functional
from poolformer_jax.network.functional import over_channels
from poolformer_jax.network.fused.dispatch import run_on_platform
from poolformer_jax.network.fused.kernels.base import Kernels

_Map = Float[Array, "b h w c"]
_Hidden = Float[Array, "b h w hidden"]
_PerHidden = Float[Array, " hidden"]


class NormDenseWeights(NamedTuple):
    """A dense layer with the norm's gain and shift folded in, and StarReLU's numbers for each channel; float32."""

    kernel: Float[Array, "c hidden"]
    bias: _PerHidden
    scale: _PerHidden
    shift: _PerHidden


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def norm_dense(kernels: Kernels | None, epsilon: float, x: _Map, weights: NormDenseWeights) -> tuple[_Hidden, _Map]:
    """`scale * relu(dense((x - mean) / std))² + shift`, with mean and std of each position; and `x`.

    With `x` as a result, the gradient rule adds the gradient of another use of `x`, in the same pass.

    Args:
        kernels: compute the passes that they support, on their platform.
        epsilon: of the norm.
        x: feature maps.
        weights: of the dense layer and of StarReLU.
    """

    def by_xla(maps: tuple[_Map], parameters: Any, _: Any) -> tuple[_Hidden, tuple[()]]:
        return _by_xla(epsilon, *maps, parameters[1]), ()

    hidden: Array
    hidden, _ = run_on_platform({"default": by_xla}, kernels, "norm_dense", (x,), _with(epsilon, weights))
    return hidden, x


def _by_xla(epsilon: float, x: _Map, weights: NormDenseWeights) -> _Hidden:
    inner = functional.dense(functional.standardize(x, (-1,), epsilon), weights.kernel, weights.bias)
    squares: Array = functional.ACTIVATIONS["relu2"](inner)
    return squares * over_channels(weights.scale, squares) + over_channels(weights.shift, squares)


def _forward(
    kernels: Kernels | None, epsilon: float, x: _Map, weights: NormDenseWeights
) -> tuple[tuple[_Hidden, _Map], tuple[_Map, NormDenseWeights]]:
    return norm_dense(kernels, epsilon, x, weights), (x, weights)


def norm_dense_gradient(
    kernels: Kernels | None,
    epsilon: float,
    residuals: tuple[_Map, NormDenseWeights],
    cotangents: tuple[_Hidden, _Map],
) -> tuple[_Map, NormDenseWeights]:
    """The gradients of `norm_dense` by x and weights."""
    x, weights = residuals

    def by_xla(maps: tuple[_Map, _Map, _Hidden], parameters: Any, _: Any) -> tuple[_Map, NormDenseWeights]:
        x, dtrunk, dhidden = maps
        _, vjp = jax.vjp(partial(_by_xla, epsilon), x, parameters[1])
        dx, dweights = vjp(dhidden)
        return dx + dtrunk, dweights

    dhidden, dtrunk = cotangents
    gradients: tuple[_Map, NormDenseWeights] = run_on_platform(
        {"default": by_xla}, kernels, "norm_dense_gradient", (x, dtrunk, dhidden), _with(epsilon, weights)
    )
    return gradients


def _with(epsilon: float, weights: NormDenseWeights) -> tuple[Float[Array, ""], NormDenseWeights]:
    return jnp.asarray(epsilon, jnp.float32), weights


norm_dense.defvjp(_forward, norm_dense_gradient)

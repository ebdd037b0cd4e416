"""The MLP branch of blocks with layer norm and StarReLU, with a gradient rule, for the kernels on a TPU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from poolformer_jax.network import functional
from poolformer_jax.network.functional import over_channels, widen
from poolformer_jax.network.fused.block import MlpWeights
from poolformer_jax.network.fused.dispatch import run_on_platform
from poolformer_jax.network.fused.kernels.base import Kernels, Pass
from poolformer_jax.network.fused.statistics import broadcast_over_map

_Map = Float[Array, "b h w c"]
_PerImage = Float[Array, " b"]
# The trunk's factor for each channel, and the branch's weights.
_Parameters = tuple[Float[Array, " c"], MlpWeights]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def norm_mlp_residual(
    kernels: Kernels | None, epsilon: float, x: _Map, keep: _PerImage, parameters: _Parameters
) -> _Map:
    """`trunk * x + keep * dense2(relu(dense1((x - mean) / std))²)`, with mean and std of each position.

    Args:
        kernels: compute the passes that they support, on their platform.
        epsilon: of the norm.
        x: feature maps.
        keep: drop path's factor for each image, 1 without drop path; a constant without a gradient.
        parameters: the trunk's factor for each channel; the dense layers with norm and StarReLU folded in.
    """

    def by_xla(maps: tuple[_Map, _PerImage], parameters: Any, _: Any) -> tuple[_Map, tuple[()]]:
        return _by_xla(epsilon, maps, parameters[1:]), ()

    y: Array
    y, _ = _run(kernels, "norm_mlp_residual", by_xla, (x, keep), epsilon, parameters)
    return y


def _by_xla(epsilon: float, maps: tuple[_Map, _PerImage], parameters: _Parameters) -> _Map:
    (x, keep), (trunk, weights) = maps, parameters
    standard = functional.standardize(x, (-1,), epsilon)
    hidden = functional.ACTIVATIONS["relu2"](functional.dense(standard, weights.kernel1, weights.bias1))
    branch = functional.dense(hidden, weights.kernel2, weights.bias2)
    return (widen(x) * over_channels(trunk, widen(x)) + widen(branch) * broadcast_over_map(keep)).astype(x.dtype)


def _forward(
    kernels: Kernels | None, epsilon: float, x: _Map, keep: _PerImage, parameters: _Parameters
) -> tuple[_Map, tuple[_Map, _PerImage, _Parameters]]:
    return norm_mlp_residual(kernels, epsilon, x, keep, parameters), (x, keep, parameters)


def norm_mlp_gradient(
    kernels: Kernels | None, epsilon: float, residuals: tuple[_Map, _PerImage, _Parameters], dy: _Map
) -> tuple[_Map, _PerImage, _Parameters]:
    """The gradients of `norm_mlp_residual` by x, keep (zero) and parameters."""
    x, keep, parameters = residuals

    def by_xla(maps: tuple[_Map, _PerImage, _Map], parameters: Any, _: Any) -> tuple[_Map, _Parameters]:
        x, keep, dy = maps
        _, vjp = jax.vjp(lambda x, parameters: _by_xla(epsilon, (x, keep), parameters), x, parameters[1:])
        gradients: tuple[_Map, _Parameters] = vjp(dy)
        return gradients

    dx, dparameters = _run(kernels, "norm_mlp_gradient", by_xla, (x, keep, dy), epsilon, parameters)
    return dx, jnp.zeros_like(keep), dparameters


def _run(
    kernels: Kernels | None,
    name: Pass,
    by_xla: Callable[..., Any],
    batched: tuple[Array, ...],
    epsilon: float,
    parameters: _Parameters,
) -> Any:
    replicated = (jnp.asarray(epsilon, jnp.float32), *parameters)
    hidden_features = len(parameters[1].bias1)
    return run_on_platform({"default": by_xla}, kernels, name, batched, replicated, hidden_features=hidden_features)


norm_mlp_residual.defvjp(_forward, norm_mlp_gradient)

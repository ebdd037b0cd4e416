"""The layer norm of feature maps, with a gradient rule, for the kernels on a TPU."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from poolformer_jax.network import functional
from poolformer_jax.network.fused.dispatch import run_on_platform
from poolformer_jax.network.fused.kernels.base import Kernels

_Map = Float[Array, "b h w c"]
_Parameters = tuple[Float[Array, " c"], Float[Array, " c"]]  # gain and shift


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def layer_norm(kernels: Kernels | None, epsilon: float, x: _Map, parameters: _Parameters) -> _Map:
    """`functional.layer_norm` of a feature map, with `parameters` gain and shift.

    `kernels` compute the passes that they support, on their platform.
    """

    def by_xla(maps: tuple[_Map], parameters: Any, _: Any) -> tuple[_Map, tuple[()]]:
        (x,), (_, gain, shift) = maps, parameters
        return functional.layer_norm(x, gain, shift, epsilon), ()

    y: Array
    y, _ = run_on_platform({"default": by_xla}, kernels, "layer_norm", (x,), _with(epsilon, parameters))
    return y


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def layer_norm_and_input(
    kernels: Kernels | None, epsilon: float, x: _Map, parameters: _Parameters
) -> tuple[_Map, _Map]:
    """`layer_norm`, and `x`: the gradient rule adds the gradient of another use of `x`, in the same pass."""
    return layer_norm(kernels, epsilon, x, parameters), x


def _forward(
    kernels: Kernels | None, epsilon: float, x: _Map, parameters: _Parameters
) -> tuple[_Map, tuple[_Map, _Parameters]]:
    return layer_norm(kernels, epsilon, x, parameters), (x, parameters)


def layer_norm_gradient(
    kernels: Kernels | None, epsilon: float, residuals: tuple[_Map, _Parameters], dy: _Map, *trunk: _Map
) -> tuple[_Map, _Parameters]:
    """The gradients of `layer_norm` by x, added to the gradient `trunk` of another use of x, and by the parameters."""
    x, parameters = residuals

    def by_xla(maps: tuple[_Map, ...], parameters: Any, _: Any) -> tuple[_Map, _Parameters]:
        x, dy, *trunk = maps
        _, vjp = jax.vjp(partial(functional.layer_norm, epsilon=epsilon), x, *parameters[1:])
        dx, dgain, dshift = vjp(dy)
        return sum(trunk, start=dx), (dgain, dshift)

    gradients: tuple[_Map, _Parameters] = run_on_platform(
        {"default": by_xla}, kernels, "layer_norm_gradient", (x, dy, *trunk), _with(epsilon, parameters)
    )
    return gradients


def _forward_and_input(
    kernels: Kernels | None, epsilon: float, x: _Map, parameters: _Parameters
) -> tuple[tuple[_Map, _Map], tuple[_Map, _Parameters]]:
    return layer_norm_and_input(kernels, epsilon, x, parameters), (x, parameters)


def _gradient_and_input(
    kernels: Kernels | None, epsilon: float, residuals: tuple[_Map, _Parameters], cotangents: tuple[_Map, _Map]
) -> tuple[_Map, _Parameters]:
    return layer_norm_gradient(kernels, epsilon, residuals, *cotangents)


def _with(epsilon: float, parameters: _Parameters) -> tuple[Array, ...]:
    return jnp.asarray(epsilon, jnp.float32), *parameters


layer_norm.defvjp(_forward, layer_norm_gradient)
layer_norm_and_input.defvjp(_forward_and_input, _gradient_and_input)

"""The end of a sep_conv mixer, after its convolution, with a gradient rule, for the kernels on a TPU."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from poolformer_jax.network import functional
from poolformer_jax.network.functional import widen
from poolformer_jax.network.fused.dispatch import run_on_platform
from poolformer_jax.network.fused.kernels.base import Kernels
from poolformer_jax.network.fused.statistics import broadcast_over_map

_Map = Float[Array, "b h w c"]
_Hidden = Float[Array, "b h w hidden"]
_PerImage = Float[Array, " b"]
_Parameters = tuple[Float[Array, "hidden c"], Float[Array, " c"]]  # kernel and bias
_Residuals = tuple[_Hidden, _PerImage, _Parameters]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def dense_residual(kernels: Kernels | None, x: _Map, hidden: _Hidden, keep: _PerImage, parameters: _Parameters) -> _Map:
    """`x + keep * dense(hidden)`.

    Args:
        kernels: compute the passes that they support, on their platform.
        x: feature maps.
        hidden: feature maps.
        keep: drop path's factor for each image, 1 without drop path; a constant without a gradient.
        parameters: kernel and bias of the dense layer.
    """

    def by_xla(batched: tuple[_Map, _Hidden, _PerImage], parameters: _Parameters, _: Any) -> tuple[_Map, tuple[()]]:
        x, hidden, keep = batched
        return (widen(x) + _branch(hidden, keep, parameters)).astype(x.dtype), ()

    y: Array
    y, _ = run_on_platform({"default": by_xla}, kernels, "dense_residual", (x, hidden, keep), parameters)
    return y


def _branch(hidden: _Hidden, keep: _PerImage, parameters: _Parameters) -> _Map:
    return widen(functional.dense(hidden, *parameters)) * broadcast_over_map(keep)


def _forward(
    kernels: Kernels | None, x: _Map, hidden: _Hidden, keep: _PerImage, parameters: _Parameters
) -> tuple[_Map, _Residuals]:
    return dense_residual(kernels, x, hidden, keep, parameters), (hidden, keep, parameters)


def dense_residual_gradient(
    kernels: Kernels | None, residuals: _Residuals, dy: _Map
) -> tuple[_Map, _Hidden, _PerImage, _Parameters]:
    """The gradients of `dense_residual` by x (`dy`), hidden, keep (zero) and parameters."""
    hidden, keep, parameters = residuals

    def by_xla(
        batched: tuple[_Map, _Hidden, _PerImage], parameters: _Parameters, _: Any
    ) -> tuple[_Hidden, _Parameters]:
        dy, hidden, keep = batched
        _, vjp = jax.vjp(lambda hidden, parameters: _branch(hidden, keep, parameters), hidden, parameters)
        gradients: tuple[_Hidden, _Parameters] = vjp(widen(dy))
        return gradients

    dhidden, dparameters = run_on_platform(
        {"default": by_xla}, kernels, "dense_residual_gradient", (dy, hidden, keep), parameters
    )
    return dy, dhidden, jnp.zeros_like(keep), dparameters


dense_residual.defvjp(_forward, dense_residual_gradient)

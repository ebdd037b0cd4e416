"""One gradient rule for the passes of the second paper's blocks, which kernels may compute forward and backward."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from poolformer_jax.network.fused.dispatch import run_on_platform
from poolformer_jax.network.fused.kernels.base import Kernels, Pass


class KernelPass(NamedTuple):
    """A pass over feature maps.

    Attributes:
        name: of the pass.
        gradient: the name of its gradient.
        compute: the pass for XLA: a function of the maps, of drop path's factors if it has any, and of the parameters.
        epsilon: keyword of `compute`, if it has a norm.
        returns_input: the pass also returns its first map. The gradient rule then adds the gradient of another use of
            this map, in the same pass.
    """

    name: Pass
    gradient: Pass
    compute: Callable[..., Array]
    epsilon: float | None = None
    returns_input: bool = False

    def by_xla(self, arrays: tuple[Array, ...], parameters: tuple[Any, ...]) -> Array:
        """The map that the pass computes."""
        options = {} if self.epsilon is None else {"epsilon": self.epsilon}
        return self.compute(*arrays, *parameters, **options)

    def with_epsilon(self, parameters: tuple[Any, ...]) -> tuple[Array | None, tuple[Any, ...]]:
        """What kernels take: epsilon as an array, and the parameters."""
        return None if self.epsilon is None else jnp.asarray(self.epsilon, jnp.float32), parameters


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run(
    this: KernelPass,
    kernels: Kernels | None,
    maps: tuple[Array, ...],
    keep: tuple[Array, ...],
    parameters: tuple[Any, ...],
) -> Any:
    """The map that a pass computes, and the first of `maps` if it returns it.

    Args:
        this: the pass.
        kernels: compute it on their platform; they must support it.
        maps: feature maps.
        keep: drop path's factor for each image, or nothing; without a gradient.
        parameters: trees of arrays.
    """

    def by_xla(batched: Any, replicated: Any, _: Any) -> tuple[Array, tuple[()]]:
        maps, keep = batched
        return this.by_xla((*maps, *keep), replicated[1]), ()

    y, _ = run_on_platform({"default": by_xla}, kernels, this.name, (maps, keep), this.with_epsilon(parameters))
    return (y, maps[0]) if this.returns_input else y


def _forward(
    this: KernelPass,
    kernels: Kernels | None,
    maps: tuple[Array, ...],
    keep: tuple[Array, ...],
    parameters: tuple[Any, ...],
) -> tuple[Any, Any]:
    return run(this, kernels, maps, keep, parameters), (maps, keep, parameters)


def _backward(this: KernelPass, kernels: Kernels | None, residuals: Any, cotangents: Any) -> tuple[Any, Any, Any]:
    maps, keep, parameters = residuals

    def by_xla(batched: Any, replicated: Any, _: Any) -> tuple[tuple[Array, ...], Any]:
        maps, keep, (dy, *trunk) = batched
        _, vjp = jax.vjp(lambda maps, parameters: this.by_xla((*maps, *keep), parameters), maps, replicated[1])
        (dx, *others), dparameters = vjp(dy)
        return (sum(trunk, start=dx), *others), dparameters

    batched = maps, keep, cotangents if this.returns_input else (cotangents,)
    dmaps, dparameters = run_on_platform(
        {"default": by_xla}, kernels, this.gradient, batched, this.with_epsilon(parameters)
    )
    return dmaps, jax.tree.map(jnp.zeros_like, keep), dparameters


run.defvjp(_forward, _backward)

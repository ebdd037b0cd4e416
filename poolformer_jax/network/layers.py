"""Linen modules that declare parameters from the table, and drop path.

`functional`, `token_mixers`, `block` and `heads` compute with these parameters.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array, Float, PRNGKeyArray

from poolformer_jax.network import functional
from poolformer_jax.network.parameters import Parameter

# Nested dictionaries of arrays, by the parts of their names in the parameter tree.
Params = Mapping[str, Any]


def declare(module: nn.Module, tree: Mapping[str, Any]) -> Params:
    """Declares the parameters of `tree` below `module`, float32, and returns them in nested dictionaries.

    Args:
        module: the module whose compact method calls this.
        tree: as `parameters.subtree` returns it.
    """
    return {
        name: _Group(entry, name=name)() if isinstance(entry, Mapping) else module.param(name, initial_value, entry)
        for name, entry in tree.items()
    }


class _Group(nn.Module):
    """The scope of the parameters below one name."""

    tree: Mapping[str, Any]

    @nn.compact
    def __call__(self) -> Params:
        return declare(self, self.tree)


def initial_value(key: PRNGKeyArray, parameter: Parameter) -> Float[Array, "..."]:
    """The initial value of a parameter, float32."""
    distribution, size = parameter.initial
    match distribution:
        case "uniform":
            return jax.random.uniform(key, parameter.shape, jnp.float32, -size, size)
        case "normal":
            return jnp.asarray(initializers.normal(size)(key, parameter.shape, jnp.float32))
        case _:
            return jnp.full(parameter.shape, size, jnp.float32)


class DropPath(nn.Module):
    """Stochastic depth on a residual branch; does nothing outside training. Draws from the "dropout" stream."""

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "b ..."], train: bool) -> Float[Array, "b ..."]:
        if not train or self.rate == 0:
            return x
        return functional.drop_path(self.make_rng("dropout"), x, self.rate)

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
from poolformer_jax.network.parameter_table import PARAMS
from poolformer_jax.network.parameters import Parameter

# Nested dictionaries of arrays, by the parts of their names in the parameter tree.
Params = Mapping[str, Any]


def declare(module: nn.Module, tree: Mapping[str, Any]) -> Params:
    """Declares the parameters of `tree` below `module`, float32, and returns them in nested dictionaries."""
    return {name: _declare_entry(module, name, entry) for name, entry in tree.items()}


def _declare_entry(module: nn.Module, name: str, entry: Mapping[str, Any] | Parameter) -> Any:
    if isinstance(entry, Mapping):
        return _Group(entry, name=name)()
    if entry.row.collection == PARAMS:
        return module.param(name, initial_value, entry)
    # In another collection, so that nothing that follows "params" trains, decays or averages it.
    return module.variable(entry.row.collection, name, lambda: initial_value(module.make_rng(PARAMS), entry)).value


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
        case "mixing":
            uniform = jax.random.uniform(key, parameter.shape, jnp.float32, 0, size)
            return jax.nn.softmax(uniform, axis=0)
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

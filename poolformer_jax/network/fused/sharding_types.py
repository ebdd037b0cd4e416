"""Shardings in the types of jax arrays: explicit mesh axes, and axes that vary inside `jax.shard_map`.

With a mesh of explicit axes (`jax.make_mesh` makes them) an array's type holds its sharding, and jax refuses an
operation whose result could have several shardings. Inside `jax.shard_map` the type holds the axes along which the
array varies from device to device. The branches of `lax.platform_dependent`, the carry of a `lax.scan` and the
gradients of a custom VJP must have equal types. They do if the compiler chooses the shardings, and if all arguments
vary along the same axes.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxtyping import Array

_Tree = TypeVar("_Tree")
_Results = TypeVar("_Results")


def with_auto_sharding(function: Callable[..., _Results], *arguments: Any, specs: Any) -> _Results:
    """`function(*arguments)`, where the compiler chooses the shardings and all arguments vary along the same axes.

    Args:
        function: of trees of arrays, to a tree of arrays.
        arguments: its arguments.
        specs: the results' sharding along explicit axes; a tree of PartitionSpec, or a prefix of one.
    """
    arguments = match_varying_axes(arguments)
    meshes = (jax.typeof(array).sharding.mesh for array in jax.tree.leaves(arguments))
    mesh = next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
    if mesh is None:
        return function(*arguments)
    explicit = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Explicit)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda spec: isinstance(spec, P))
    results: _Results = jax.sharding.auto_axes(function, axes=explicit, out_sharding=shardings)(*arguments)
    return results


def match_varying_axes(tree: _Tree) -> _Tree:
    """Marks every array of the tree as varying along each axis along which one of them varies.

    The gradient of an array that did not vary is the sum over these axes.
    """
    axes = frozenset[str]().union(*(_varying_axes(array) for array in jax.tree.leaves(tree)))

    def mark(array: Array) -> Array:
        missing = tuple(sorted(axes - _varying_axes(array)))
        return lax.pcast(array, missing, to="varying") if missing else array

    varying: _Tree = jax.tree.map(mark, tree)
    return varying


def partition_spec(array: Array) -> tuple[Any, ...]:
    """The explicit mesh axes that shard each axis of an array; None for an axis that is not sharded."""
    spec = jax.typeof(array).sharding.spec
    return (*spec, *[None] * (array.ndim - len(spec)))


def _varying_axes(array: Array) -> frozenset[str]:
    axes: frozenset[str] = jax.typeof(array).manual_axis_type.varying
    return axes

"""What the type of a jax array says besides shape and dtype: how the devices of a mesh share it.

With a mesh of explicit axes, as `jax.make_mesh` makes them, it holds the sharding, and an operation that several
shardings would fit is refused. Inside `jax.shard_map` it holds the axes along which the array varies from device to
device. Loops, ways by platform and a gradient's own rule have to return arrays of equal types; they do where the
compiler shards, and where everything that they work on varies alike.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

_Tree = TypeVar("_Tree")
_Results = TypeVar("_Results")


def on_any_mesh(function: Callable[..., _Results], *arguments: Any, specs: Any) -> _Results:
    """`function(*arguments)`, with shardings that the compiler chooses inside, and arguments that vary alike.

    Args:
        function: of trees of arrays, to one.
        arguments: its arguments.
        specs: how the results are shared along explicit axes; a tree of PartitionSpec, or a prefix of one.
    """
    arguments = vary_alike(arguments)
    meshes = (jax.typeof(array).sharding.mesh for array in jax.tree.leaves(arguments))
    mesh = next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
    if mesh is None:
        return function(*arguments)
    explicit = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Explicit)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda spec: isinstance(spec, P))
    results: _Results = jax.sharding.auto_axes(function, axes=explicit, out_sharding=shardings)(*arguments)
    return results


def vary_alike(tree: _Tree) -> _Tree:
    """The same arrays, typed as varying along every axis along which one of them varies.

    The gradient of one that did not vary is the sum over these axes.
    """
    axes = frozenset[str]().union(*(_varying(array) for array in jax.tree.leaves(tree)))

    def vary(array: Array) -> Array:
        missing = tuple(sorted(axes - _varying(array)))
        return lax.pcast(array, missing, to="varying") if missing else array

    varying: _Tree = jax.tree.map(vary, tree)
    return varying


def spec_of(array: Array) -> tuple[Any, ...]:
    """Along which explicit axes each axis of an array is cut; None for those that are whole."""
    spec = jax.typeof(array).sharding.spec
    return (*spec, *[None] * (array.ndim - len(spec)))


def _varying(array: Array) -> frozenset[str]:
    axes: frozenset[str] = jax.typeof(array).manual_axis_type.varying
    return axes

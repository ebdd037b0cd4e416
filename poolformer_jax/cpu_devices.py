"""Several CPU devices, usually one for each core: how they share a batch of images (data parallelism), or one image.

One CPU device shares every operation among the cores, which wait for each other some five hundred times in a batch of
16, and then go on with what another core has computed. With a device of its own each core computes whole images, and
meets no other. One image they compute together (tensor parallelism), and meet once a block (docs/performance.md).
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from poolformer_jax.cores import available_cores
from poolformer_jax.folding import FoldedParams

_Apply = Callable[[Any, Array], Array]

# As many as keep a core busy, and a part's hidden layers in its caches (docs/performance.md).
_IMAGES_PER_CORE = 2


def images_on_device(mesh: Mesh) -> int | None:
    """How many images each device of a mesh takes at once; None for all that it holds.

    For `folded_apply`. CPU devices share the cores that this process may use.
    """
    if not _is_cpu(mesh):
        return None
    return _IMAGES_PER_CORE * max(1, available_cores() // mesh.size)


def data_parallel(apply: _Apply, mesh: Mesh) -> _Apply:
    """`apply(params, images)`, in which several CPU devices each work through the images that they hold.

    Cut up by XLA, a loop over parts of the batch would fetch every part from the other devices. On other platforms, and
    for one device, it is `apply` itself.
    """
    if mesh.size == 1 or not _is_cpu(mesh):
        return apply
    replicated, batch = P(), P(mesh.axis_names)
    return jax.shard_map(apply, mesh=mesh, in_specs=(replicated, batch), out_specs=batch)


def tensor_parallel(apply: _Apply, params: FoldedParams, mesh: Mesh) -> tuple[_Apply, FoldedParams] | None:
    """`apply(params, images)`, computed by all devices of a mesh together, and the parameters as they hold them.

    Every device has all of every feature map. Of a convolution it computes some of the channels, of an MLP some of the
    hidden layer (arXiv 1909.08053, Section 3), with that part of the weights. So no two devices multiply by the same
    weights, which are most of what is read where maps are small, and they meet once in a convolution and once in a
    block. What lies between is little, and every device computes it.

    Args:
        apply: with `folded_apply(..., axis=...)`, the mesh's one axis.
        params: the folded parameters.
        mesh: the devices.

    Returns:
        None where there is only one device, or not a CPU's, or where as many do not divide what they would share.
    """
    if mesh.size == 1 or not _is_cpu(mesh):  # of kernels' devices the parameters are not folded
        return None
    (axis,) = mesh.axis_names
    specs, replicated = _partition_specs(params, axis), P()
    if not _divides(params, specs, mesh.size):
        return None
    shardings = jax.tree.map(lambda _, spec: NamedSharding(mesh, spec), params, specs)
    # Every device returns the same logits; that they are the same is not something that shard_map could know.
    shared = jax.shard_map(apply, mesh=mesh, in_specs=(specs, replicated), out_specs=replicated, check_vma=False)
    return shared, jax.device_put(params, shardings)


def _partition_specs(folded: FoldedParams, axis: str) -> Any:
    """How devices along a mesh axis hold the parameters: a tree of PartitionSpecs."""
    every, first, second = P(), P(axis), P(None, axis)
    channels = P(None, None, None, axis)

    def spec(path: tuple[Any, ...], _: Array) -> P:
        match [entry.key for entry in path][-2:]:
            case ["stem" | "downsample", "kernel"]:
                return channels
            case ["fc1", "kernel"]:
                return second
            case ["stem" | "downsample" | "fc1", "bias"] | ["fc2", "kernel"]:
                return first
            case _:
                return every

    return jax.tree_util.tree_map_with_path(spec, folded)


def _divides(params: FoldedParams, specs: Any, devices: int) -> bool:
    """Whether so many devices divide every axis that they would share."""
    divisible = jax.tree.map(
        lambda leaf, spec: all(name is None or size % devices == 0 for size, name in zip(leaf.shape, spec)),
        params,
        specs,
    )
    return all(jax.tree.leaves(divisible))


def _is_cpu(mesh: Mesh) -> bool:
    return bool(mesh.devices.flat[0].platform == "cpu")

"""Several CPU devices, usually one for each core: how they share a batch of images, or one image.

One CPU device shares every operation among the cores, which wait for each other some five hundred times in a batch of
16, and then go on with what another core has computed. With a device of its own each core computes whole images, and
meets no other. One image they compute together (`shared_image`), and meet once a block (docs/performance.md, "CPU").
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from poolformer_jax.cores import available_cores
from poolformer_jax.folding import FoldedParams
from poolformer_jax.shared_image import shares

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


def share_batch(apply: _Apply, mesh: Mesh) -> _Apply:
    """`apply(params, images)`, in which several CPU devices each work through the images that they hold.

    Cut up by XLA, a loop over parts of the batch would fetch every part from the other devices. On other platforms, and
    for one device, it is `apply` itself.
    """
    if mesh.size == 1 or not _is_cpu(mesh):
        return apply
    replicated, batch = P(), P(mesh.axis_names)  # type: ignore[no-untyped-call]
    return jax.shard_map(apply, mesh=mesh, in_specs=(replicated, batch), out_specs=batch)


def share_image(apply: _Apply, params: FoldedParams, mesh: Mesh) -> tuple[_Apply, FoldedParams] | None:
    """`apply(params, images)`, computed by all devices of a mesh together, and the parameters as they hold them.

    Args:
        apply: with `shared_image.shared_apply` over the mesh's one axis.
        params: the folded parameters.
        mesh: the devices.

    Returns:
        None where there is only one device, or not a CPU's, or where as many do not divide what they would share.
    """
    if mesh.size == 1 or not _is_cpu(mesh):  # of kernels' devices the parameters are not folded
        return None
    (axis,) = mesh.axis_names
    specs, replicated = shares(params, axis), P()  # type: ignore[no-untyped-call]
    if not _divides(params, specs, mesh.size):
        return None
    shardings = jax.tree.map(lambda _, spec: NamedSharding(mesh, spec), params, specs)
    # Every device returns the same logits; that they are the same is not something that shard_map could know.
    shared = jax.shard_map(apply, mesh=mesh, in_specs=(specs, replicated), out_specs=replicated, check_vma=False)
    return shared, jax.device_put(params, shardings)


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

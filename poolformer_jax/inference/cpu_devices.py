"""Several CPU devices, usually one for each core: how they share a batch of images.

One CPU device shares every operation among the cores, which wait for each other some five hundred times in a batch of
16, and then go on with what another core has computed. With a device of its own each core computes whole images, and
meets no other. An image that comes alone is one device's, which has all of the cores (docs/performance.md).
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from poolformer_jax.process import available_cores

_Apply = Callable[[Any, Array], Array]

# As many as keep a core busy, and a part's hidden layers in its caches (docs/performance.md).
_IMAGES_PER_CORE = 2


def images_on_device(mesh: Mesh) -> int | None:
    """How many images each device of a mesh takes at once; None for all that it holds.

    For `folded_apply`. CPU devices share the cores that this process may use.
    """
    if not is_cpu(mesh):
        return None
    return _IMAGES_PER_CORE * max(1, available_cores() // mesh.size)


def data_parallel(apply: _Apply, mesh: Mesh) -> _Apply:
    """`apply(params, images)`, in which several CPU devices each work through the images that they hold.

    Cut up by XLA, a loop over parts of the batch would fetch every part from the other devices. On other platforms, and
    for one device, it is `apply` itself.
    """
    if mesh.size == 1 or not is_cpu(mesh):
        return apply
    replicated, batch = P(), P(mesh.axis_names)
    return jax.shard_map(apply, mesh=mesh, in_specs=(replicated, batch), out_specs=batch)


def is_cpu(mesh: Mesh) -> bool:
    """Whether a mesh is of CPU devices."""
    return bool(mesh.devices.flat[0].platform == "cpu")

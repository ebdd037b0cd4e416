"""Where arrays live: a mesh of devices ("data", "fsdp"), and one rule from shapes to shardings.

The batch is sharded over both axes: every device has different images. Parameters, their running mean and the
optimizer's state are sharded over "fsdp" and replicated over "data"; XLA gathers a layer's weights where they are used.
Sources: arXiv 2004.13336 and 1910.02054 (ZeRO), arXiv 2105.04663 (GSPMD).
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from poolformer_jax.errors import InputError
from train.config import MeshConfig

BATCH_AXES = ("data", "fsdp")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices, by default all of all processes, as a (data, fsdp) mesh.

    The data center's network between slices of TPUs (or hosts of GPUs) is slower than the connections inside them.
    "data" goes over the slices, one after the other, and "fsdp" stays inside each if it divides a slice's devices. So
    only the sums of gradients cross that network. Raises ValueError if their number is not the product of the two axes.
    """
    devices = jax.devices() if devices is None else devices
    data = len(devices) // config.fsdp if config.data == -1 else config.data
    if data * config.fsdp != len(devices):
        raise InputError(
            f"mesh.data={config.data} and mesh.fsdp={config.fsdp} do not arrange the {len(devices)} devices of this "
            f"run. Expected a product of {len(devices)}; with mesh.data=-1 any mesh.fsdp that divides it will do."
        )
    shape = (data, config.fsdp)
    slices = devices_of_slices(devices)
    if any(len(part) % config.fsdp for part in slices):
        slices = [devices]
    arranged = np.concatenate(
        [mesh_utils.create_device_mesh((len(part) // config.fsdp, config.fsdp), devices=part) for part in slices]
    )
    if not _consecutive([device.process_index for device in arranged.flat]):
        # A process feeds one consecutive part of the batch, so its devices must be neighbours.
        arranged = np.array(sorted(devices, key=lambda device: (device.process_index, device.id))).reshape(shape)
    return Mesh(arranged, BATCH_AXES)


def devices_of_slices(devices: Sequence[jax.Device]) -> list[Sequence[jax.Device]]:
    """The devices of each slice of a multislice run, or of each host of GPUs; all of them where there are no slices."""
    slices: dict[int, list[jax.Device]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    return [slices[index] for index in sorted(slices)]


def _consecutive(owners: list[int]) -> bool:
    changes = sum(left != right for left, right in itertools.pairwise(owners))
    return changes == len(set(owners)) - 1


class ProcessPart(TypedDict):
    """Part `process_index` of `process_count`: arguments of `train_batches` and `evaluation_batches`."""

    process_index: int
    process_count: int


def process_part(mesh: Mesh) -> ProcessPart:
    """Which of the equal, consecutive parts of every global batch this process's devices hold."""
    owners = list(dict.fromkeys(device.process_index for device in mesh.devices.flat))
    return {"process_index": owners.index(jax.process_index()), "process_count": len(owners)}


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis sharded over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(mesh: Mesh, state: Any, min_size: int) -> Any:
    """The sharding of every array of a state, from its shape: the largest axis that "fsdp" divides is sharded.

    Arrays with fewer than `min_size` elements are replicated, as are those without such an axis.
    """
    return jax.tree.map(lambda array: NamedSharding(mesh, _partition(array.shape, mesh.shape["fsdp"], min_size)), state)


def _partition(shape: tuple[int, ...], parts: int, min_size: int) -> PartitionSpec:
    divisible = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or not divisible or np.prod(shape, dtype=np.int64) < min_size:
        return PartitionSpec()
    axis = max(divisible, key=lambda axis: shape[axis])
    return PartitionSpec(*(None,) * axis, "fsdp")


def check_batch(mesh: Mesh, batch_size: int, accumulate: int, name: str = "data.batch_size") -> None:
    """Raises ValueError, with the nearest sizes that work, if the devices cannot share a global batch evenly."""
    unit = mesh.devices.size * accumulate
    if batch_size % unit:
        nearest = sorted({max(unit, batch_size // unit * unit), (batch_size // unit + 1) * unit})
        parts = f" in optimizer.accumulate={accumulate} parts" if accumulate > 1 else ""
        raise InputError(
            f"{name}={batch_size} cannot be shared evenly by {mesh.devices.size} devices{parts}. Expected a multiple "
            f"of {unit}: {' or '.join(map(str, nearest))}."
        )


def to_devices(mesh: Mesh, batch: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, jax.Array]:
    """The named arrays of the global batch, sharded over all devices; `batch` is this process's part of it."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh), {name: batch[name] for name in names})


def to_host(mesh: Mesh, tree: Any) -> Any:
    """The whole arrays as NumPy arrays on every process. Collective: all processes must call it."""
    gather = jax.jit(lambda arrays: arrays, out_shardings=replicated(mesh))
    return jax.tree.map(np.asarray, gather(tree))

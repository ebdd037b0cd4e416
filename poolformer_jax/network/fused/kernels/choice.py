"""Which devices the kernels run on, which maps they take, and how every device gets its own images."""

import dataclasses
import importlib
import math
import re
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from poolformer_jax.errors import InputError
from poolformer_jax.network.fused import tpu_layout

# Where a tile of the largest published network fits into VMEM. What jax calls these TPUs; others are not checked.
TPU_KINDS = ("TPU v5 lite", "TPU v5e", "TPU v6 lite", "TPU v6e")
# From Ampere on GPUs multiply bfloat16.
OLDEST_GPU = 8.0
_TRITON = "jax.experimental.pallas.triton"

POOL_SIZE = 3
# The functions of `tpu`, as `tpu.PASSES` has them. `gpu.PASSES` has those of the MLP.
Pass = Literal["pooling_residual", "pooling_gradient", "mlp_residual", "mlp_gradient"]

TPU_IMAGES = 16  # a TPU's register of bfloat16 holds as many rows
_WIDEST_ROW = 64  # a row's positions are written out one by one

GPU_ROWS = 64  # positions of a map in a program
_SMALLEST_SIDE, _LARGEST_SIDE = 16, 64  # of blocks: what its matrix units take, and its registers hold


@dataclasses.dataclass(frozen=True)
class _Kernels:
    """Kernels are not cut up by XLA: which devices share a batch has to be said.

    Attributes:
        mesh: the devices of the computation; None for one, and inside `jax.shard_map` with `check_vma=False`.
        batch_axes: the axes of the mesh that the batch is cut over.
        interpret: compute what the kernels compute on any platform, slowly; for tests.
    """

    mesh: Mesh | None = None
    batch_axes: tuple[str, ...] = ()
    interpret: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError if an axis is not one of the mesh."""
        axes = self.mesh.axis_names if self.mesh is not None else ()
        if unknown := set(self.batch_axes) - set(axes):
            raise InputError(
                f"batch_axes={self.batch_axes} names {', '.join(sorted(unknown))}, and the mesh has the axes "
                f"{tuple(axes)}. Expected axes of the mesh that the batch is cut over."
            )

    def on_each_device(
        self, kernel: Callable[..., tuple[Any, Any, Any]], maps: Any, vectors: Any, replicated: Any, batch_axis: int
    ) -> tuple[Any, Any, Any]:
        """What `kernel` makes of every device's own images: (map, vectors, sums over all images).

        Args:
            kernel: what one device computes of (maps, vectors, replicated).
            maps: feature maps.
            vectors: [batch] or [batch, channels] each.
            replicated: arrays that every device has.
            batch_axis: where the batch is in `maps`.
        """
        if self.mesh is None:
            return kernel(maps, vectors, replicated)

        def local(*arguments: Any) -> tuple[Any, Any, Any]:
            result, vectors, sums = kernel(*arguments)
            return result, vectors, jax.tree.map(lambda total: total[None], sums)

        # The sums leave one for each device, and XLA adds them up as it does all other gradients: in one exchange.
        of_map, of_vectors, of_all = P(*[None] * batch_axis, self.batch_axes), P(self.batch_axes), P()
        result, vectors, sums = jax.shard_map(
            local,
            mesh=Mesh(self.mesh.devices, self.mesh.axis_names),  # of automatic axes, as in `on_any_mesh`
            in_specs=(of_map, of_vectors, of_all),
            out_specs=(of_map, of_vectors, of_vectors),
            check_vma=False,
        )(maps, vectors, replicated)
        return result, vectors, jax.tree.map(lambda total: total.sum(0), sums)

    @property
    def _shards(self) -> int:
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in self.batch_axes)


@dataclasses.dataclass(frozen=True)
class TpuKernels(_Kernels):
    """Lets a model use Pallas kernels where it is compiled for TPUs.

    With several devices these have to be named:

        mesh = jax.make_mesh((4,), ("data",))
        model = PoolFormerForImageClassification(config, jnp.bfloat16, kernels=TpuKernels(mesh, ("data",)))

    For one device `TpuKernels()` will do, and inside `jax.shard_map` with `check_vma=False`.

    Attributes:
        mesh: the devices of the computation; None for one.
        batch_axes: the axes of the mesh that the batch is cut over.
        interpret: compute what the kernels compute on any platform, slowly; for tests.
    """

    platform: ClassVar[str] = "tpu"

    def supports(self, name: Pass, x: Array, hidden_features: int | None) -> bool:
        """Whether there is a kernel of pass `name`, and maps like `x`, and their hidden layers, are in its reach."""
        per_device, rest = divmod(len(x), self._shards)
        pixels = tpu_layout.group_size(x.shape[2], x.shape[3], x.dtype)
        return (
            x.dtype == jnp.bfloat16
            and rest == 0
            and per_device >= TPU_IMAGES
            and per_device % TPU_IMAGES == 0
            and pixels <= 2
            and 2 <= x.shape[2] // pixels <= _WIDEST_ROW
            and (hidden_features is None or _mlp_fits(x.shape[3], hidden_features, pixels))
        )

    def call(self, name: Pass, pixels: int, batched: Any, replicated: Any) -> tuple[Any, Any]:
        """The kernel of pass `name`.

        Args:
            name: which pass.
            pixels: neighbours of a row that share a TPU's lanes.
            batched: arrays whose first axis is the batch.
            replicated: arrays that every device has.

        Returns:
            Arrays for each image, and sums over all images.
        """
        # Pallas is experimental and takes a while to import: whoever uses no kernels does without.
        from poolformer_jax.network.fused.kernels.tpu import PASSES

        return PASSES[name](self, pixels, batched, replicated)


@dataclasses.dataclass(frozen=True)
class GpuKernels(_Kernels):
    """Lets a model use Pallas kernels where it is compiled for NVIDIA GPUs, Ampere or newer.

    Several devices are named as with `TpuKernels`.

    Attributes:
        mesh: the devices of the computation; None for one.
        batch_axes: the axes of the mesh that the batch is cut over.
        interpret: compute what the kernels compute on any platform, slowly; for tests.
    """

    platform: ClassVar[str] = "cuda"

    def supports(self, name: Pass, x: Array, hidden_features: int | None) -> bool:
        """As `TpuKernels.supports`."""
        per_device, rest = divmod(len(x), self._shards)
        positions = per_device * x.shape[1] * x.shape[2]
        return (
            hidden_features is not None
            and name in ("mlp_residual", "mlp_gradient")
            and x.dtype == jnp.bfloat16
            and rest == 0
            and positions % GPU_ROWS == 0
            and positions * max(x.shape[3], hidden_features) < 2**31  # programs count numbers in 32 bits
            and min(side_of_blocks(x.shape[3]), side_of_blocks(hidden_features)) >= _SMALLEST_SIDE
        )

    def call(self, name: Pass, _: int, batched: Any, replicated: Any) -> tuple[Any, Any]:
        """The kernels of pass `name`, as `TpuKernels.call`."""
        from poolformer_jax.network.fused.kernels.gpu import PASSES

        return PASSES[name](self, batched, replicated)


Kernels = TpuKernels | GpuKernels


def kernels_for(mesh: Mesh, batch_axes: tuple[str, ...]) -> Kernels | None:
    """The kernels for the devices of a mesh, if all of them are of a kind that there are kernels for."""
    devices = list(mesh.devices.flat)
    if all(device.device_kind in TPU_KINDS for device in devices):
        return TpuKernels(mesh, batch_axes)
    if all(_compute_capability(device) >= OLDEST_GPU for device in devices) and _has_triton():
        return GpuKernels(mesh, batch_axes)
    return None


def _mlp_fits(channels: int, hidden_features: int, pixels: int) -> bool:
    # Imported late, as in `TpuKernels.call`.
    from poolformer_jax.network.fused.kernels import tpu_mlp

    return tpu_mlp.fits(pixels * channels, pixels * hidden_features, pixels)


def side_of_blocks(channels: int, largest: int = _LARGEST_SIDE) -> int:
    """How many channels a block on a GPU has: the largest power of two that divides them, up to `largest`."""
    return min(channels & -channels, largest)


def _has_triton() -> bool:
    """Whether this version of jax compiles Pallas kernels by Triton."""
    try:
        importlib.import_module(_TRITON)
    except ImportError:
        return False
    return True


def _compute_capability(device: jax.Device) -> float:
    """0 for what is no NVIDIA GPU: others have none, or one like "gfx942"."""
    capability = getattr(device, "compute_capability", None) or ""
    return float(capability) if re.fullmatch(r"\d+\.\d+", capability) else 0.0

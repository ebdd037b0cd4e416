"""Which devices the kernels run on, which maps they take, and how every device gets its own images."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from poolformer_jax import lanes

# Where a tile of the largest published network fits into VMEM. What jax calls these TPUs; others are not checked.
DEVICE_KINDS = ("TPU v5 lite", "TPU v5e", "TPU v6 lite", "TPU v6e")

POOL_SIZE = 3
# The functions of `branches`, as `branches.PASSES` has them.
Pass = Literal["pooling_residual", "pooling_gradient", "mlp_residual", "mlp_gradient"]

IMAGES = 16  # a register of bfloat16 holds as many rows
_WIDEST_ROW = 64  # a row's positions are written out one by one


@dataclasses.dataclass(frozen=True)
class TpuKernels:
    """Lets a model use the kernels where it is compiled for TPUs.

    Pallas kernels are not cut up by XLA, so several devices have to be named:

        mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        model = PoolFormerForImageClassification(config, jnp.bfloat16, kernels=TpuKernels(mesh, ("data",)))

    Inside `jax.shard_map`, and for one device, `TpuKernels()` will do.

    Attributes:
        mesh: the devices of the computation; None for one.
        batch_axes: the axes of the mesh that the batch is cut over.
        interpret: compute what the kernels compute on any platform, slowly; for tests.
    """

    mesh: Mesh | None = None
    batch_axes: tuple[str, ...] = ()
    interpret: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError if an axis is not one of the mesh, or is explicit."""
        axes = self.mesh.axis_names if self.mesh is not None else ()
        if unknown := set(self.batch_axes) - set(axes):
            raise ValueError(
                f"batch_axes={self.batch_axes} names {', '.join(sorted(unknown))}, and the mesh has the axes "
                f"{tuple(axes)}. Expected axes of the mesh that the batch is cut over."
            )
        if self.mesh is not None and set(self.mesh.axis_types) != {AxisType.Auto}:
            raise ValueError(
                f"The mesh has axes of the types {self.mesh.axis_types}. Expected a mesh of AxisType.Auto: "
                "jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))."
            )

    def take(self, x: Array) -> bool:
        """Whether maps like `x` are in a kernel's reach: type, images on each device, width."""
        per_device, rest = divmod(len(x), self._shards)
        pixels = lanes.group_size(x.shape[2], x.shape[3], x.dtype)
        return (
            x.dtype == jnp.bfloat16
            and rest == 0
            and per_device >= IMAGES
            and per_device % IMAGES == 0
            and pixels <= 2
            and 2 <= x.shape[2] // pixels <= _WIDEST_ROW
        )

    def run(self, name: Pass, pixels: int, cut: Any, whole: Any) -> tuple[Any, Any]:
        """The kernel of pass `name`.

        Args:
            name: which pass.
            pixels: neighbours of a row that share a TPU's lanes.
            cut: arrays whose first axis is the batch.
            whole: arrays that every device has.

        Returns:
            Arrays for each image, and sums over all images.
        """
        # Pallas is experimental and takes a while to import: whoever uses no kernels does without.
        from poolformer_jax.kernels.branches import PASSES

        return PASSES[name](self, pixels, cut, whole)

    def on_each_device(
        self, kernel: Callable[..., tuple[Any, Any, Any]], maps: Any, vectors: Any, whole: Any
    ) -> tuple[Any, Any, Any]:
        """`kernel(maps, vectors, whole)`, every device with its own images; returns (map, vectors, sums over images).

        Args:
            kernel: what one device computes.
            maps: [height, width, batch, channels] each.
            vectors: [batch] or [batch, channels] each.
            whole: arrays that every device has.
        """
        if self.mesh is None:
            return kernel(maps, vectors, whole)

        def local(*arguments: Any) -> tuple[Any, Any, Any]:
            result, vectors, sums = kernel(*arguments)
            return result, vectors, jax.tree.map(lambda total: total[None], sums)

        # The sums leave one for each device, and XLA adds them up as it does all other gradients: in one exchange.
        of_map, of_vectors, of_all = P(None, None, self.batch_axes), P(self.batch_axes), P()  # type: ignore[no-untyped-call]
        result, vectors, sums = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(of_map, of_vectors, of_all),
            out_specs=(of_map, of_vectors, of_vectors),
            check_vma=False,
        )(maps, vectors, whole)
        return result, vectors, jax.tree.map(lambda total: total.sum(0), sums)

    @property
    def _shards(self) -> int:
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in self.batch_axes)


def has_kernels(devices: Iterable[jax.Device]) -> bool:
    """Whether all of these devices are of a kind that the kernels were compiled for."""
    return all(device.device_kind in DEVICE_KINDS for device in devices)

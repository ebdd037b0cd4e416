"""The interface of the kernels, the sizes that they support, and how devices share a batch."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
from flax.typing import Dtype
from jax.sharding import Mesh, PartitionSpec as P

from poolformer_jax.errors import InputError

Pass = Literal[
    "pooling_residual",
    "pooling_gradient",
    "mlp_residual",
    "mlp_gradient",
    "depthwise_convolution",
    "depthwise_gradient",
    "norm_mlp_residual",
    "norm_mlp_gradient",
    "norm_dense",
    "norm_dense_gradient",
    "layer_norm",
    "layer_norm_gradient",
    "dense_residual",
    "dense_residual_gradient",
    "attention",
    "attention_gradient",
]
"""The passes over a feature map, forward and backward: PoolFormer's two branches; a sep_conv mixer's start, its
depthwise convolution and its end; the MLP branch with layer norm and StarReLU; other layer norms; and self-attention,
whose maps are [batch, heads, channels of a head, positions]."""

POOL_SIZE = 3
TPU_IMAGES = 16  # rows in a TPU's register of bfloat16
GPU_ROWS = 64  # positions of a map in a program
_LARGEST_BLOCK = 64  # most channels that a GPU's registers hold


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The interface of `TpuKernels` and `GpuKernels`.

    XLA does not partition kernels, so they must know which devices share a batch. The fields are described there.
    """

    platform: ClassVar[str]
    batch_multiple: ClassVar[int]
    """Kernels support maps of any size for a multiple of this number of images per device."""

    mesh: Mesh | None = None
    batch_axes: tuple[str, ...] = ()
    interpret: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError if an axis is not one of the mesh."""
        axes = self.mesh.axis_names if self.mesh is not None else ()
        if unknown := set(self.batch_axes) - set(axes):
            raise InputError(
                f"batch_axes={self.batch_axes} names {', '.join(sorted(unknown))}, but the mesh has the axes "
                f"{tuple(axes)}. Expected axes of the mesh over which the batch is sharded."
            )

    def supports(self, name: Pass, shape: tuple[int, ...], dtype: Dtype, hidden_features: int | None) -> bool:
        """Whether a kernel computes pass `name` of maps of this shape and type.

        Args:
            name: the pass.
            shape: [batch, height, width, channels], the batch of all devices.
            dtype: type of the maps.
            hidden_features: channels of an MLP's hidden layer; None for the other passes.
        """
        raise NotImplementedError

    def call(self, name: Pass, pixels: int, batched: Any, replicated: Any) -> tuple[Any, Any]:
        """Runs the kernel of pass `name`.

        Args:
            name: the pass.
            pixels: neighbours of a row that share a TPU's lanes.
            batched: arrays whose first axis is the batch.
            replicated: arrays that every device has.

        Returns:
            Arrays for each image, and sums over all images.
        """
        raise NotImplementedError

    def run_on_shards(
        self, kernel: Callable[..., tuple[Any, Any, Any]], maps: Any, vectors: Any, replicated: Any, batch_axis: int
    ) -> tuple[Any, Any, Any]:
        """Runs `kernel` on every device's shard of the batch: (map, vectors, sums over all images).

        Args:
            kernel: a function of (maps, vectors, replicated).
            maps: feature maps.
            vectors: [batch] or [batch, channels] each.
            replicated: arrays that every device has.
            batch_axis: the axis of `maps` that is the batch.
        """
        if self.mesh is None:
            return kernel(maps, vectors, replicated)

        def local(*arguments: Any) -> tuple[Any, Any, Any]:
            result, vectors, sums = kernel(*arguments)
            return result, vectors, jax.tree.map(lambda total: total[None], sums)

        # Each device returns its own sums, and XLA adds them up with all other gradients: in one all-reduce.
        map_spec, vector_spec, replicated_spec = P(*[None] * batch_axis, self.batch_axes), P(self.batch_axes), P()
        result, vectors, sums = jax.shard_map(
            local,
            mesh=Mesh(self.mesh.devices, self.mesh.axis_names),  # with automatic axes, as in `with_auto_sharding`
            in_specs=(map_spec, vector_spec, replicated_spec),
            out_specs=(map_spec, vector_spec, vector_spec),
            check_vma=False,
        )(maps, vectors, replicated)
        return result, vectors, jax.tree.map(lambda total: total.sum(0), sums)

    @property
    def shards(self) -> int:
        """The number of devices that share a batch."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in self.batch_axes)


def block_size(channels: int, largest: int = _LARGEST_BLOCK) -> int:
    """Channels of a block on a GPU: the largest power of two that divides `channels`, up to `largest`."""
    return min(channels & -channels, largest)

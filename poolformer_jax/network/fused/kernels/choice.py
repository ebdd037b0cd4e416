"""The kernels for TPUs and for NVIDIA GPUs: the devices that they run on, and the maps that they support."""

import dataclasses
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax.sharding import Mesh

from poolformer_jax.network.fused import tpu_layout
from poolformer_jax.network.fused.kernels.base import GPU_ROWS, TPU_IMAGES, Kernels, Pass, block_size

# jax's names of the TPUs whose VMEM holds a tile of the largest published network; others are not checked.
TPU_KINDS = ("TPU v5 lite", "TPU v5e", "TPU v6 lite", "TPU v6e")
OLDEST_GPU = 8.0  # compute capability of Ampere, the first that multiplies bfloat16

_WIDEST_ROW, _WIDEST_CONVOLVED_ROW = 64, 128  # the kernels' code is unrolled over a row's positions
_FEWEST_POSITIONS = tpu_layout.LANES  # for attention; XLA is as fast as kernels whose lanes are half empty
_SMALLEST_BLOCK = 16  # fewest channels that a GPU's matrix units take


@dataclasses.dataclass(frozen=True)
class TpuKernels(Kernels):
    """Lets a model use Pallas kernels where it is compiled for TPUs.

    With several devices, name them and the axes that share the batch:

        mesh = jax.make_mesh((4,), ("data",))
        model = PoolFormerForImageClassification(config, jnp.bfloat16, kernels=TpuKernels(mesh, ("data",)))

    `TpuKernels()` is enough for one device, and inside `jax.shard_map` with `check_vma=False`.

    Attributes:
        mesh: the devices of the computation; None for one.
        batch_axes: the axes of the mesh over which the batch is sharded.
        interpret: run the kernels in Pallas's interpreter, slowly, on any platform; for tests.
    """

    platform: ClassVar[str] = "tpu"
    batch_multiple: ClassVar[int] = TPU_IMAGES

    def supports(self, name: Pass, shape: tuple[int, ...], dtype: Dtype, hidden_features: int | None) -> bool:
        """As `Kernels.supports`."""
        batch, _, width, channels = shape
        per_device, rest = divmod(batch, self.shards)
        if dtype != jnp.bfloat16 or rest or per_device < TPU_IMAGES or per_device % TPU_IMAGES:
            return False
        # Pallas is experimental and takes a while to import, so only users of kernels import it.
        from poolformer_jax.network.fused.kernels import tpu_attention, tpu_mlp, tpu_rows

        if name.startswith("depthwise"):
            return channels >= tpu_layout.LANES and width <= _WIDEST_CONVOLVED_ROW
        if name.startswith("layer_norm"):
            return True
        if name.startswith("attention"):
            positions = channels
            return positions >= _FEWEST_POSITIONS and tpu_attention.fits(positions)
        if name.startswith(("norm_dense", "dense_residual")):
            return tpu_rows.fits(channels, 2 * channels)
        if name.startswith("norm_mlp"):
            return hidden_features is not None and tpu_rows.fits(channels, hidden_features)
        pixels = tpu_layout.group_size(width, channels, dtype)
        return (
            pixels <= 2
            and 2 <= width // pixels <= _WIDEST_ROW
            and (hidden_features is None or tpu_mlp.fits(pixels * channels, pixels * hidden_features, pixels))
        )

    def call(self, name: Pass, pixels: int, batched: Any, replicated: Any) -> tuple[Any, Any]:
        """As `Kernels.call`."""
        from poolformer_jax.network.fused.kernels.tpu import PASSES

        return PASSES[name](self, pixels, batched, replicated)


@dataclasses.dataclass(frozen=True)
class GpuKernels(Kernels):
    """Lets a model use Pallas kernels where it is compiled for NVIDIA GPUs, Ampere or newer.

    Its attributes are those of `TpuKernels`.
    """

    platform: ClassVar[str] = "cuda"
    batch_multiple: ClassVar[int] = GPU_ROWS

    def supports(self, name: Pass, shape: tuple[int, ...], dtype: Dtype, hidden_features: int | None) -> bool:
        """As `Kernels.supports`."""
        batch, height, width, channels = shape
        per_device, rest = divmod(batch, self.shards)
        positions = per_device * height * width
        return (
            hidden_features is not None
            and name == "mlp_residual"
            and dtype == jnp.bfloat16
            and rest == 0
            and positions % GPU_ROWS == 0
            and positions * max(channels, hidden_features) < 2**31  # kernels index with 32 bits
            and min(block_size(channels), block_size(hidden_features)) >= _SMALLEST_BLOCK
        )

    def call(self, name: Pass, _: int, batched: Any, replicated: Any) -> tuple[Any, Any]:
        """As `Kernels.call`. Raises ImportError if this version of jax cannot compile Pallas kernels with Triton."""
        from poolformer_jax.network.fused.kernels.gpu import PASSES

        return PASSES[name](self, batched, replicated)


def kernels_for(mesh: Mesh, batch_axes: tuple[str, ...]) -> Kernels | None:
    """The kernels for the devices of a mesh; None unless all of them are of a kind that has kernels."""
    devices = list(mesh.devices.flat)
    if all(device.device_kind in TPU_KINDS for device in devices):
        return TpuKernels(mesh, batch_axes)
    if all(_compute_capability(device) >= OLDEST_GPU for device in devices):
        return GpuKernels(mesh, batch_axes)
    return None


def _compute_capability(device: jax.Device) -> float:
    """0 unless this is an NVIDIA GPU; AMD's have a name like "gfx942"."""
    capability = getattr(device, "compute_capability", None) or ""
    return float(capability) if re.fullmatch(r"\d+\.\d+", capability) else 0.0

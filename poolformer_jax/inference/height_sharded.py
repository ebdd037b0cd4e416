"""Images too large for one device: each device holds a band of rows of the pixels and of every feature map.

Only the input's sharding is given. XLA's partitioner adds the communication between bands: the few rows that
convolution and pooling windows share (a halo exchange), and the sums of the norms over the whole image. Parameters are
replicated.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float, Num

from poolformer_jax.errors import InputError
from poolformer_jax.inference.folding import fold
from poolformer_jax.inference.jax_operations import folded_features, folded_head
from poolformer_jax.network import ImageClassifierOutput, PoolFormerConfig, check_dtype, check_pixel_values

# Token mixers whose results depend on more than a few neighbouring rows.
_MIX_ALL_POSITIONS = {"attention", "spatial_fc", "random"}


@dataclasses.dataclass(frozen=True)
class MemoryPerDevice:
    """The memory that one device needs to compute an image, in bytes."""

    parameters_and_pixels: int  # the arguments: all parameters, and the device's band of the image
    results: int  # the device's bands of the feature maps, and the logits
    temporaries: int  # the peak of everything in between

    def __str__(self) -> str:
        parts = (self.parameters_and_pixels, self.results, self.temporaries)
        inputs, results, temporaries = (part / 2**20 for part in parts)
        total = sum(parts) / 2**20
        return (
            f"{total:.1f} MiB per device: {inputs:.1f} parameters and pixels, {results:.1f} results, "
            f"{temporaries:.1f} temporaries"
        )


class HeightShardedModel:
    """The network on images whose rows are sharded over devices; the same function as on one device.

    Args:
        config: the architecture.
        variables: `{"params": tree}`.
        devices: the devices to shard over; by default all devices of this process.
        dtype: type that feature maps are computed in, float32 or bfloat16.

    Raises:
        ValueError: for several devices if the network has attention, spatial_fc or random mixers; if the config's
            strides, kernels and padding give maps without equal bands; for another dtype; or without devices.
        WeightsMismatch: if the variables are not those of such a network.
    """

    def __init__(
        self,
        config: PoolFormerConfig,
        variables: Mapping[str, Any],
        *,
        devices: Sequence[jax.Device] | None = None,
        dtype: Dtype = jnp.float32,
    ) -> None:
        check_dtype(dtype)
        devices = jax.local_devices() if devices is None else devices
        if not devices:
            raise InputError("devices is empty. Expected at least one, or None for all devices of this process.")
        if len(devices) > 1 and (unsharded := sorted(_MIX_ALL_POSITIONS & set(config.token_mixers))):
            raise InputError(
                f"The token mixer {' and '.join(unsharded)} reads every position of a map for each of its results, so "
                "that every device would hold whole maps. Expected one device, or a network without it."
            )
        mesh = Mesh(np.asarray(devices), ("height",))
        self.config, self._mesh = config, mesh
        self._rows, replicated = NamedSharding(mesh, P(None, "height")), NamedSharding(mesh, P())
        self._multiple = config.total_stride * mesh.size
        if any(rows % mesh.size for rows in config.feature_sizes(self._multiple)):  # and so at every multiple
            raise InputError(
                f"The feature maps of {self._multiple} pixels are {config.feature_sizes(self._multiple)} pixels high, "
                f"which cannot be divided equally among {mesh.size} devices. Expected padding of about half of "
                "patch_sizes, as in the published networks, or one device."
            )
        self._params = jax.device_put(fold(config, variables), replicated)
        self._apply = jax.jit(
            partial(_apply, config, dtype),
            in_shardings=(replicated, self._rows),
            out_shardings=(self._rows, replicated),
        )

    def __call__(self, pixel_values: Num[Array | np.ndarray, "b h w c"]) -> ImageClassifierOutput:
        """Logits and feature maps; the maps stay sharded by rows.

        Args:
            pixel_values: [batch, height, width, num_channels], normalised. The height is a multiple of the network's
                stride times the number of devices, so that every band of every map has the same number of rows.

        Raises:
            ValueError: for another height, naming the next larger one that works, or pixels that the model does not
                take.
        """
        self._check(pixel_values.shape)
        with jax.set_mesh(self._mesh):  # the caller may have set another mesh
            hidden_states, logits = self._apply(self._params, jax.device_put(pixel_values, self._rows))
        return ImageClassifierOutput(loss=None, logits=logits, hidden_states=hidden_states)

    def memory_per_device(self, height: int, width: int, batch: int = 1) -> MemoryPerDevice:
        """XLA's memory plan for images of `height` x `width` pixels; compiles without computing."""
        shape = (batch, height, width, self.config.num_channels)
        self._check(shape)
        pixels = jax.ShapeDtypeStruct(shape, jnp.float32)
        with jax.set_mesh(self._mesh):
            plan: Any = self._apply.lower(self._params, pixels).compile().memory_analysis()
        return MemoryPerDevice(plan.argument_size_in_bytes, plan.output_size_in_bytes, plan.temp_size_in_bytes)

    def _check(self, shape: tuple[int, ...]) -> None:
        check_pixel_values(self.config, shape)
        height = shape[1]
        if height % self._multiple:
            larger = -(-height // self._multiple) * self._multiple
            raise InputError(
                f"The image is {height} pixels high. Expected a multiple of {self._multiple}, the network's stride of "
                f"{self.config.total_stride} times the number of devices: resize it to {larger}, or use fewer devices."
            )


def _apply(
    config: PoolFormerConfig, dtype: Dtype, folded: dict[str, Any], pixel_values: Num[Array, "b h w c"]
) -> tuple[tuple[Float[Array, "b _h _w _c"], ...], Float[Array, "b labels"]]:
    hidden_states = folded_features(config, folded, pixel_values, dtype)
    return hidden_states, folded_head(config, folded, hidden_states[-1])

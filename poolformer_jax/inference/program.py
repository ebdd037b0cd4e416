"""8-bit pixels in, probabilities or features out: a network compiled for a few batch sizes, on all of the devices.

Pixels are copied to the devices as they are and normalised there. The network is the folded one (`folding`), or runs on
kernels where the devices have them (`network.fused`).

Several CPU devices, usually one per core, each compute whole images. With a single CPU device the cores share every
operation: in a batch of 16 they wait for each other some five hundred times, and then read what another core has
written (docs/performance.md).
"""

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float, UInt8

from poolformer_jax.compilation import compiler_options
from poolformer_jax.images import PoolFormerImageProcessor
from poolformer_jax.inference.folding import fold
from poolformer_jax.inference.jax_operations import folded_apply
from poolformer_jax.network import (
    PoolFormerConfig,
    PoolFormerForImageClassification,
    check_variables,
    kernel_stages,
    over_channels,
)
from poolformer_jax.network.fused import KernelMode, Kernels, choose_kernels
from poolformer_jax.resources import available_cores

# From parameters and images to one row per image.
Apply: TypeAlias = Callable[[Any, Array], Any]
# From config, variables, the devices, the compute type, height and width of the images, and the use of kernels to a
# function of parameters and normalised images, and its parameters: such as `fastest_network`.
MakeNetwork: TypeAlias = Callable[
    [PoolFormerConfig, Mapping[str, Any], Mesh, Dtype, tuple[int, int], KernelMode], tuple[Apply, Any]
]

# Enough to keep a core busy, and few enough for a part's hidden layers to stay in its caches (docs/performance.md).
# The hidden maps between the layers of a sep_conv mixer need more space.
_IMAGES_PER_CORE, _IMAGES_PER_CORE_WITH_SEP_CONV = 2, 1


class BatchProgram:
    """A function of parameters and 8-bit pixels, for batches of any size up to the largest of `batch_sizes`.

    Every batch is sharded over the devices, and parameters are replicated. With several CPU devices, a single image is
    computed by the first one, with all cores; 1 is among the batch sizes then.

    Args:
        apply: from parameters and pixels [batch, height, width, channels] to arrays with a row per image.
        params: the parameters.
        batch_size: images per batch, rounded up to a multiple of the number of devices.
        mesh: the devices to compute on, on one axis.
    """

    def __init__(self, apply: Apply, params: Any, batch_size: int, mesh: Mesh) -> None:
        single = mesh.size > 1 and _is_cpu(mesh)
        self.batch_sizes = batch_sizes_up_to(batch_size, mesh.size, single)
        first = Mesh(mesh.devices[:1], mesh.axis_names)
        meshes = {size: first if single and size == 1 else mesh for size in self.batch_sizes}
        programs = {mesh: _program(apply, params, mesh) for mesh in set(meshes.values())}
        self._programs = {size: programs[mesh] for size, mesh in meshes.items()}

    def __call__(self, images: Sequence[UInt8[np.ndarray, "h w c"]]) -> Any:
        """Starts a batch and returns without waiting for it.

        Args:
            images: at least one, at most `batch_sizes[-1]`, resized and cropped. They are padded to the next of
                `batch_sizes`.

        Returns:
            What `apply` returns: a row per image, in order, and then rows of the padding.
        """
        padded = pad_batch(images, self.batch_sizes)
        return self._programs[len(padded)](padded)


def fastest_network(
    config: PoolFormerConfig,
    variables: Mapping[str, Any],
    mesh: Mesh,
    dtype: Dtype,
    image_size: tuple[int, int],
    kernels: KernelMode = "auto",
) -> tuple[Apply, Any]:
    """`apply(params, pixels)`, which computes logits in the way that is fastest on these devices, and its parameters.

    `mesh` has the devices that share the batch, on one axis. `kernels="auto"` warns if the devices have kernels that
    fail their verification. Raises ValueError if kernels is "on" and there are none for these devices and this type;
    WeightsMismatch if the variables are not those of such a network.
    """
    chosen = working_kernels(config, mesh, dtype, image_size, kernels)
    if chosen is None:
        apply = partial(folded_apply, config, dtype=dtype, images_at_once=images_at_once(config, mesh))
        return apply, fold(config, variables)
    return trained_network(config, variables, dtype, chosen)


def working_kernels(
    config: PoolFormerConfig, mesh: Mesh, dtype: Dtype, image_size: tuple[int, int], mode: KernelMode
) -> Kernels | None:
    """The kernels to use, or None. The arguments and errors are those of `fastest_network`."""
    chosen, verification = choose_kernels(
        mode, mesh, mesh.axis_names, dtype, kernel_stages(config, image_size, train=False), gradients=False
    )
    if verification is not None and verification.problem:
        warnings.warn(f"{verification.warning} (kernels='off' skips this check.)", stacklevel=6)
    return chosen


def images_at_once(config: PoolFormerConfig, mesh: Mesh) -> int | None:
    """The number of images that each device of a mesh should compute at a time; None for all of its images.

    CPU devices share the cores that this process may use.
    """
    if not _is_cpu(mesh):
        return None
    images = _IMAGES_PER_CORE_WITH_SEP_CONV if "sep_conv" in config.token_mixers else _IMAGES_PER_CORE
    return images * max(1, available_cores() // mesh.size)


def shard_on_cpu(apply: Apply, mesh: Mesh) -> Apply:
    """`apply` with each of several CPU devices looping over the images that it holds.

    If XLA partitioned the loop over parts of the batch, it would fetch every part from the other devices. On other
    platforms and on one device this is `apply` itself.
    """
    if mesh.size == 1 or not _is_cpu(mesh):
        return apply
    replicated, batch = P(), P(mesh.axis_names)
    return jax.shard_map(apply, mesh=mesh, in_specs=(replicated, batch), out_specs=batch)


def _is_cpu(mesh: Mesh) -> bool:
    return bool(mesh.devices.flat[0].platform == "cpu")


def trained_network(
    config: PoolFormerConfig, variables: Mapping[str, Any], dtype: Dtype, kernels: Kernels | None = None
) -> tuple[Apply, Any]:
    """The model itself, without folding."""
    check_variables(config, variables)
    return partial(_logits, PoolFormerForImageClassification(config, dtype, kernels=kernels)), dict(variables)


class _Program(NamedTuple):
    """A compiled function of parameters and pixels, with the parameters on its devices."""

    apply: Apply
    params: Any
    mesh: Mesh

    def __call__(self, pixels: UInt8[np.ndarray, "b h w c"]) -> Any:
        with jax.set_mesh(self.mesh):  # the caller may have set another mesh
            return self.apply(self.params, jax.device_put(pixels, NamedSharding(self.mesh, P(self.mesh.axis_names))))


def _program(apply: Apply, params: Any, mesh: Mesh) -> _Program:
    """`apply` compiled for a batch that is sharded over the devices."""
    replicated, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P(mesh.axis_names))
    compiled = jax.jit(
        shard_on_cpu(apply, mesh),
        in_shardings=(replicated, sharded),
        out_shardings=sharded,
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )
    return _Program(compiled, jax.device_put(params, replicated), mesh)


def batch_sizes_up_to(batch_size: int, devices: int = 1, single: bool = False) -> tuple[int, ...]:
    """The batch sizes to compile for: multiples of the number of devices, each four times the one before.

    `single` adds 1, for an image that one device computes.
    """
    if single and batch_size == 1:
        return (1,)
    largest = -(-batch_size // devices) * devices
    growing = itertools.takewhile(lambda size: size < largest, (devices * 4**power for power in itertools.count()))
    return (*([1] if single else []), *growing, largest)


def pad_batch(images: Sequence[UInt8[np.ndarray, "h w c"]], batch_sizes: Sequence[int]) -> UInt8[np.ndarray, "b h w c"]:
    """The images as one array of the next larger of `batch_sizes`, with zeros behind them."""
    size = next(size for size in batch_sizes if size >= len(images))
    padded = np.zeros((size, *images[0].shape), np.uint8)
    padded[: len(images)] = images
    return padded


def normalized(image_processor: PoolFormerImageProcessor, pixels: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """8-bit pixels scaled and normalised on the devices."""
    values = pixels.astype(jnp.float32)
    scale, shift = (over_channels(vector, values) for vector in image_processor.scale_and_shift())
    return values * scale + shift


def _logits(model: PoolFormerForImageClassification, variables: Any, x: Array) -> Array:
    output: Any = model.apply(variables, x)
    return jnp.asarray(output.logits)

"""Eight-bit pixels in, probabilities out: the network compiled for a few batch sizes, on all of the devices.

Pixels cross to the devices as they are and are normalised there. The network is the folded one (`folding`), or computed
by kernels on devices that have them (`network.fused`).
"""

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, UInt8

from poolformer_jax.compilation import compiler_options
from poolformer_jax.images.processor import PoolFormerImageProcessor
from poolformer_jax.inference.cpu_devices import data_parallel, images_on_device, is_cpu
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

_AXIS = "batch"
_Apply = Callable[[Any, Array], Array]


class Probabilities:
    """The probability of every class, for batches of any size up to the largest of `batch_sizes`.

    Devices share every batch, for which each holds all of the parameters. Of several CPU devices the first computes an
    image that comes alone, with all cores; then 1 is among the batch sizes.

    The arguments are those of `ImageClassifier`.
    """

    def __init__(
        self,
        config: PoolFormerConfig,
        variables: Mapping[str, Any],
        image_processor: PoolFormerImageProcessor,
        *,
        dtype: Dtype,
        batch_size: int,
        fold_parameters: bool,
        kernels: KernelMode,
        devices: Sequence[jax.Device],
    ) -> None:
        mesh = Mesh(np.asarray(devices), (_AXIS,))
        if fold_parameters:
            image_size = image_processor.output_size
            assert image_size is not None, "ImageClassifier checks it"
            network, params = fastest_network(config, variables, mesh, dtype, image_size, kernels)
        else:
            network, params = _network_as_trained(config, variables, dtype)
        apply = partial(_probabilities, image_processor, network)
        alone = mesh.size > 1 and is_cpu(mesh)
        self.batch_sizes = _bucket_sizes(batch_size, mesh.size, alone)
        meshes = {size: Mesh(mesh.devices[:1], (_AXIS,)) if alone and size == 1 else mesh for size in self.batch_sizes}
        programs = {mesh: _program(apply, params, mesh) for mesh in set(meshes.values())}
        self._programs = {size: programs[mesh] for size, mesh in meshes.items()}

    def __call__(self, images: Sequence[UInt8[np.ndarray, "h w c"]]) -> Float[Array, "n labels"]:
        """Starts a batch without waiting for it; the first rows of the result are those of the images.

        Args:
            images: at least one, at most `batch_sizes[-1]`, resized and cropped. They are padded to the next size.
        """
        size = next(size for size in self.batch_sizes if size >= len(images))
        padded = np.zeros((size, *images[0].shape), np.uint8)
        padded[: len(images)] = images
        return self._programs[size](padded)


def fastest_network(
    config: PoolFormerConfig,
    variables: Mapping[str, Any],
    mesh: Mesh,
    dtype: Dtype,
    image_size: tuple[int, int],
    kernels: KernelMode = "auto",
) -> tuple[_Apply, Any]:
    """`apply(params, pixels)` to logits as these devices compute it fastest, and the parameters that it takes.

    Args:
        config: the architecture.
        variables: `{"params": tree}`.
        mesh: the devices that share the batch, on one axis.
        dtype: type that feature maps are computed in.
        image_size: height and width of the images in pixels.
        kernels: whether to use kernels; "auto" warns if the devices have kernels that fail their verification.

    Raises:
        ValueError: if kernels is "on" and there are none for these devices and this type.
        WeightsMismatch: if the parameters are not the architecture's.
    """
    chosen, verification = choose_kernels(
        kernels, mesh, mesh.axis_names, dtype, kernel_stages(config, image_size, train=False), gradients=False
    )
    if verification is not None and verification.problem:
        warnings.warn(f"{verification.warning} (kernels='off' leaves out this check.)", stacklevel=4)
    if chosen is None:
        apply = partial(folded_apply, config, dtype=dtype, images_at_once=images_on_device(mesh))
        return apply, fold(config, variables)
    return _network_as_trained(config, variables, dtype, chosen)


def _network_as_trained(
    config: PoolFormerConfig, variables: Mapping[str, Any], dtype: Dtype, kernels: Kernels | None = None
) -> tuple[_Apply, Any]:
    check_variables(config, variables)
    return partial(_logits, PoolFormerForImageClassification(config, dtype, kernels=kernels)), variables["params"]


class _Program(NamedTuple):
    """A function of parameters and pixels, the parameters on its devices, and these."""

    apply: _Apply
    params: Any
    mesh: Mesh

    def __call__(self, pixels: UInt8[np.ndarray, "b h w c"]) -> Float[Array, "b labels"]:
        with jax.set_mesh(self.mesh):  # whatever mesh the program around has set for itself
            return self.apply(self.params, jax.device_put(pixels, NamedSharding(self.mesh, P(_AXIS))))


def _program(apply: _Apply, params: Any, mesh: Mesh) -> _Program:
    """Every device computes its images of a batch."""
    replicated, cut = NamedSharding(mesh, P()), NamedSharding(mesh, P(_AXIS))
    compiled = jax.jit(
        data_parallel(apply, mesh),
        in_shardings=(replicated, cut),
        out_shardings=cut,
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )
    return _Program(compiled, jax.device_put(params, replicated), mesh)


def _bucket_sizes(batch_size: int, devices: int, alone: bool) -> tuple[int, ...]:
    """Batch sizes to compile for: multiples of the number of devices, each four times the one before.

    And 1 before them, where one device takes an image that comes alone.
    """
    if alone and batch_size == 1:
        return (1,)
    largest = -(-batch_size // devices) * devices
    growing = itertools.takewhile(lambda size: size < largest, (devices * 4**power for power in itertools.count()))
    return (*([1] if alone else []), *growing, largest)


def _probabilities(
    image_processor: PoolFormerImageProcessor, network: _Apply, params: Any, pixels: UInt8[Array, "b h w c"]
) -> Float[Array, "b labels"]:
    pixels = pixels.astype(jnp.float32)
    scale, shift = (over_channels(vector, pixels) for vector in image_processor.scale_and_shift())
    return jax.nn.softmax(network(params, pixels * scale + shift))


def _logits(model: PoolFormerForImageClassification, params: Any, x: Array) -> Array:
    output: Any = model.apply({"params": params}, x)
    return jnp.asarray(output.logits)

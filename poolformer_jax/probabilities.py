"""Eight-bit pixels in, probabilities out: the network compiled for a few batch sizes, on all of the devices.

Pixels cross to the devices as they are and are normalised there, and the network is the folded one (`folding`).
"""

import itertools
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
from poolformer_jax.config import PoolFormerConfig
from poolformer_jax.cpu_devices import can_share_image, images_at_once, share_batch, share_image
from poolformer_jax.folding import fold, folded_apply
from poolformer_jax.image_processor import PoolFormerImageProcessor
from poolformer_jax.model import PoolFormerForImageClassification

_AXIS = "batch"


class Probabilities:
    """The probability of every class, for batches of any size up to the largest of `batch_sizes`.

    Devices share every batch, for which each holds all of the parameters. Several CPU devices compute one image
    together where they can (`cpu_devices`); then 1 is among the batch sizes.

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
        devices: Sequence[jax.Device],
    ) -> None:
        mesh = Mesh(np.asarray(devices), (_AXIS,))
        params = fold(config, variables) if fold_parameters else variables["params"]
        alone = fold_parameters and can_share_image(params, mesh)
        apply = partial(_apply, config, image_processor, dtype, fold_parameters)
        self.batch_sizes = _bucket_sizes(batch_size, mesh.size, alone)
        self._programs: dict[int, _Program] = {}
        if alone:
            self._programs[1] = _image_program(apply, params, mesh)
        if sizes := [size for size in self.batch_sizes if size not in self._programs]:
            self._programs |= dict.fromkeys(sizes, _batch_program(apply, params, mesh))

    def __call__(self, images: Sequence[UInt8[np.ndarray, "h w c"]]) -> Float[Array, "n labels"]:
        """Starts a batch without waiting for it; the first rows of the result are those of the images.

        Args:
            images: at least one, at most `batch_sizes[-1]`, resized and cropped. They are padded to the next size.
        """
        size = next(size for size in self.batch_sizes if size >= len(images))
        padded = np.zeros((size, *images[0].shape), np.uint8)
        padded[: len(images)] = images
        return self._programs[size](padded)


class _Program(NamedTuple):
    """A function of parameters and pixels, the parameters where it wants them, and how it wants the pixels."""

    apply: Callable[[Any, Array], Array]
    params: Any
    sharding: NamedSharding

    def __call__(self, pixels: UInt8[np.ndarray, "b h w c"]) -> Float[Array, "b labels"]:
        return self.apply(self.params, jax.device_put(pixels, self.sharding))


def _batch_program(apply: Callable[..., Array], params: Any, mesh: Mesh) -> _Program:
    """Every device computes its images of a batch."""
    replicated, cut = NamedSharding(mesh, P()), NamedSharding(mesh, P(_AXIS))  # type: ignore[no-untyped-call]
    shared = share_batch(partial(apply, images_at_once=images_at_once(mesh)), mesh)
    compiled = jax.jit(
        shared, in_shardings=(replicated, cut), out_shardings=cut, compiler_options=_compiler_options(mesh)
    )
    return _Program(compiled, jax.device_put(params, replicated), cut)


def _image_program(apply: Callable[..., Array], params: Any, mesh: Mesh) -> _Program:
    """All devices compute one image."""
    shared, shares = share_image(partial(apply, shared_over=_AXIS), params, mesh)
    compiled = jax.jit(shared, compiler_options=_compiler_options(mesh))
    return _Program(compiled, shares, NamedSharding(mesh, P()))  # type: ignore[no-untyped-call]


def _compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    return compiler_options(mesh.devices.flat[0].platform)


def _bucket_sizes(batch_size: int, devices: int, alone: bool) -> tuple[int, ...]:
    """Batch sizes to compile for: multiples of the number of devices, each four times the one before.

    And 1 before them, where devices take an image that comes alone.
    """
    if alone and batch_size == 1:
        return (1,)
    largest = -(-batch_size // devices) * devices
    growing = itertools.takewhile(lambda size: size < largest, (devices * 4**power for power in itertools.count()))
    return (*([1] if alone else []), *growing, largest)


def _apply(
    config: PoolFormerConfig,
    image_processor: PoolFormerImageProcessor,
    dtype: Dtype,
    folded: bool,
    params: Mapping[str, Any],
    pixels: UInt8[Array, "b h w c"],
    images_at_once: int | None = None,
    shared_over: str | None = None,
) -> Float[Array, "b labels"]:
    scale, shift = image_processor.scale_and_shift()
    pixel_values = pixels.astype(jnp.float32) * scale + shift
    if folded:
        return jax.nn.softmax(folded_apply(dict(params), config, pixel_values, dtype, images_at_once, shared_over))
    output: Any = PoolFormerForImageClassification(config, dtype).apply({"params": params}, pixel_values)
    return jax.nn.softmax(output.logits)

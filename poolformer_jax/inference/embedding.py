"""`ImageEmbedder`: images in, features out, for search, clustering and small classifiers on top."""

import dataclasses
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax.sharding import Mesh
from jaxtyping import Array, Float32

from poolformer_jax.images import ImageError, ImageLike, PoolFormerImageProcessor, is_one_image
from poolformer_jax.inference.folding import fold
from poolformer_jax.inference.from_pretrained import FromPretrained
from poolformer_jax.inference.jax_operations import folded_features, folded_head, in_parts
from poolformer_jax.inference.program import Apply, images_at_once, working_kernels
from poolformer_jax.inference.streaming import open_stream
from poolformer_jax.network import (
    PoolFormerConfig,
    PoolFormerForImageClassification,
    check_variables,
)
from poolformer_jax.network.fused import KernelMode


class Embedding(NamedTuple):
    """The features of one image."""

    # The pooled, normalised features, which the head takes; float32 [channels of the last stage].
    features: Float32[np.ndarray, " c"]
    # The output of every stage, float32 [height, width, channels]; empty unless requested.
    feature_maps: tuple[Float32[np.ndarray, "_h _w _c"], ...]


class ImageEmbedder(FromPretrained):
    """Gives the features of images, from a network with or without a head.

    Batches are compiled, padded and sharded as by `ImageClassifier`.

    Args:
        config: the architecture.
        variables: `{"params": tree}`.
        image_processor: the preprocessing; its results must all have the same size.
        feature_maps: whether to return the feature map of every stage too; only with runtime="jax".
        dtype: type that feature maps are computed in, float32 or bfloat16.
        batch_size: images per batch, rounded up to a multiple of the number of devices.
        kernels: "auto", "on" or "off", as in `ImageClassifier`.
        devices: the devices to compute on; by default all devices of this process.
        decode_threads: threads that decode and resize; by default one per core that this process may use.
        runtime: "jax", "openvino" or "onnxruntime", as in `ImageClassifier`.

    Raises:
        ValueError: if the preprocessing does not fit the network, or for another dtype or runtime.
        ModuleNotFoundError: if the runtime is not installed.
        WeightsMismatch: if the variables do not match the config.
    """

    def __init__(
        self,
        config: PoolFormerConfig,
        variables: Mapping[str, Any],
        image_processor: PoolFormerImageProcessor,
        *,
        feature_maps: bool = False,
        dtype: Dtype = jnp.float32,
        batch_size: int = 32,
        kernels: KernelMode = "auto",
        devices: Sequence[jax.Device] | None = None,
        decode_threads: int | None = None,
        runtime: str = "jax",
    ) -> None:
        headless, backbone = _without_head(config, variables)
        self.config = config
        self.image_processor = image_processor
        self._images = open_stream(
            headless,
            backbone,
            image_processor,
            partial(_embedding_network, feature_maps),
            "logits",
            dtype=dtype,
            batch_size=batch_size,
            kernels=kernels,
            devices=devices,
            decode_threads=decode_threads,
            runtime=runtime,
            feature_maps=feature_maps,
        )
        self.batch_sizes = self._images.program.batch_sizes

    def warm_up(self) -> None:
        """Compiles the program of every batch size, so that no later call waits for it."""
        self._images.warm_up()

    def __call__(self, images: ImageLike) -> Any:
        """The features of one image or of several.

        Args:
            images: one or several that `PoolFormerImageProcessor.read` takes.

        Returns:
            For one image an `Embedding`, a tuple of `features`, float32 [channels of the last stage], and
            `feature_maps`, one float32 [height, width, channels] per stage or none.
            For several, a list of them in the same order; an image that cannot be read has an ImageError instead.

        Raises:
            ImageError: if a single image cannot be read.
        """
        if is_one_image(images):
            return _embedding(self._images.one(images))
        return list(self.stream(images))

    def stream(self, images: Iterable[ImageLike]) -> Generator[Embedding | ImageError]:
        """As `__call__`, for any number of images, one result at a time in the order given.

        Raises:
            ValueError: for one image instead of an iterable of them.
        """
        return self._images.many(images, _embedding)


def _embedding(row: Any) -> Embedding:
    """What a row of the program holds: features and feature maps, or in other runtimes than JAX the features alone."""
    return Embedding(*row) if isinstance(row, tuple) else Embedding(row, ())


def _without_head(config: PoolFormerConfig, variables: Mapping[str, Any]) -> tuple[PoolFormerConfig, dict[str, Any]]:
    backbone = {
        collection: {name: branch for name, branch in tree.items() if name != "head"}
        for collection, tree in variables.items()
    }
    return dataclasses.replace(config, num_labels=0, id2label=None), backbone


def _embedding_network(
    feature_maps: bool,
    config: PoolFormerConfig,
    variables: Mapping[str, Any],
    mesh: Mesh,
    dtype: Dtype,
    image_size: tuple[int, int],
    kernels: KernelMode,
) -> tuple[Apply, Any]:
    """A `program.MakeNetwork` of features and, if requested, feature maps; float32."""
    check_variables(config, variables)
    chosen = working_kernels(config, mesh, dtype, image_size, kernels)
    if chosen is None:
        network, params = partial(_folded, config, dtype), fold(config, variables)
    else:
        model = PoolFormerForImageClassification(config, dtype, kernels=chosen)
        network, params = partial(_with_kernels, model), dict(variables)
    return partial(_embed, network, feature_maps, images_at_once(config, mesh)), params


def _folded(config: PoolFormerConfig, dtype: Dtype, params: Any, values: Array) -> tuple[Array, tuple[Array, ...]]:
    """Pooled features and feature maps, by the folded network."""
    maps = folded_features(config, params, values, dtype)
    return folded_head(config, params, maps[-1]), maps


def _with_kernels(
    model: PoolFormerForImageClassification, variables: Any, values: Array
) -> tuple[Array, tuple[Array, ...]]:
    """The same by the network as it was trained, whose blocks have kernels."""
    output: Any = model.apply(variables, values)
    return output.logits, output.hidden_states


def _embed(
    network: Callable[[Any, Array], tuple[Array, tuple[Array, ...]]],
    feature_maps: bool,
    at_once: int | None,
    params: Any,
    values: Float32[Array, "b h w c"],
) -> Any:
    def embed(values: Array) -> tuple[Array, tuple[Array, ...]]:
        features, maps = network(params, values)
        chosen = tuple(x.astype(jnp.float32) for x in maps) if feature_maps else ()
        return features.astype(jnp.float32), chosen

    if at_once is None or len(values) <= at_once:
        return embed(values)
    return in_parts(embed, values, at_once)

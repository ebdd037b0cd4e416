"""`ImageClassifier`: images in, labels out, compiled once per batch size."""

import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax.sharding import Mesh
from jaxtyping import Array, Float32
from PIL import Image

from poolformer_jax.errors import InputError
from poolformer_jax.images import ImageError, ImageLike, PoolFormerImageProcessor, is_one_image
from poolformer_jax.inference.from_pretrained import FromPretrained
from poolformer_jax.inference.program import Apply, fastest_network, trained_network
from poolformer_jax.inference.streaming import check_at_least_one, open_stream
from poolformer_jax.network import PoolFormerConfig, check_has_probabilities, describe_network, probabilities
from poolformer_jax.network.fused import KernelMode
from poolformer_jax.weights import class_names


class Prediction(NamedTuple):
    """A class and its probability."""

    label: str
    probability: float


class ImageClassifier(FromPretrained):
    """Gives the most probable labels of images.

    Every batch is padded to one of `batch_sizes`, so that a stream of any length compiles at most
    `len(classifier.batch_sizes)` programs. Batches are sharded over the devices, parameters are replicated.

    Args:
        config: the architecture.
        variables: `{"params": tree}`.
        image_processor: the preprocessing; its results must all have the same size.
        id2label: class names by index, or a list of them; by default the config's, or ImageNet's for a published
            architecture with 1000 classes, or "class 0", "class 1", ...
        dtype: type that feature maps are computed in, float32 or bfloat16.
        batch_size: images per batch, rounded up to a multiple of the number of devices. With several CPU devices a
            single image is computed by the first one, with all cores; with batch_size=1 that is every image.
        fold_parameters: compute with the folded network (`folding`), or with kernels in bfloat16 on devices that have
            them; the function is the same. False computes the network as it was trained.
        kernels: whether to use Pallas kernels with `fold_parameters` in bfloat16, on TPUs v5e and v6e and NVIDIA GPUs
            from Ampere on. "auto" first compares them with XLA on the devices, which takes seconds, and uses XLA with
            a warning if they differ; "on" does not compare; "off" uses none.
        devices: the devices to compute on; by default all devices of this process.
        decode_threads: threads that decode and resize; by default one per core that this process may use.
        runtime: what computes the network: "jax", or on a CPU "openvino" or "onnxruntime", which are faster there. For
            these the network is exported and compared with JAX once, and then kept in a cache (`runtimes`). They take
            none of dtype, fold_parameters, kernels and devices.

    Raises:
        ValueError: if the network has no head or is a regression (as a single label without a problem_type is), or for
            names, a dtype or preprocessing that does not fit it.
        ModuleNotFoundError: if the runtime is not installed.
        WeightsMismatch: if the variables do not match the config.
    """

    def __init__(
        self,
        config: PoolFormerConfig,
        variables: Mapping[str, Any],
        image_processor: PoolFormerImageProcessor,
        *,
        id2label: Mapping[int, str] | Sequence[str] | None = None,
        dtype: Dtype = jnp.float32,
        batch_size: int = 32,
        fold_parameters: bool = True,
        kernels: KernelMode = "auto",
        devices: Sequence[jax.Device] | None = None,
        decode_threads: int | None = None,
        runtime: str = "jax",
    ) -> None:
        if kernels == "on" and not fold_parameters:
            raise InputError("kernels='on' and fold_parameters=False exclude each other. Expected one of them.")
        named = config if id2label is None else config.with_changes(id2label=id2label, num_labels=config.num_labels)
        self.config = config
        self.image_processor = image_processor
        self.id2label = class_names(named)
        check_has_probabilities(config)
        self._images = open_stream(
            config,
            variables,
            image_processor,
            partial(_probability_network, fold_parameters),
            "probabilities",
            dtype=dtype,
            batch_size=batch_size,
            kernels=kernels,
            devices=devices,
            decode_threads=decode_threads,
            runtime=runtime,
            fold_parameters=not fold_parameters,
        )
        self.batch_sizes = self._images.program.batch_sizes
        self.decode_threads = self._images.decode_threads

    def __repr__(self) -> str:
        return f"ImageClassifier({describe_network(self.config)}, batches of {self.batch_sizes[-1]})"

    def warm_up(self) -> None:
        """Compiles the program of every batch size, so that no later call waits for it."""
        self._images.warm_up()

    @overload
    def __call__(self, images: str | bytes | os.PathLike[str] | Image.Image, top_k: int = 5) -> list[Prediction]: ...

    @overload
    def __call__(
        self, images: list[Any] | tuple[Any, ...] | Iterator[Any], top_k: int = 5
    ) -> list[list[Prediction] | ImageError]: ...

    @overload
    def __call__(self, images: ImageLike, top_k: int = 5) -> Any: ...

    def __call__(self, images: ImageLike, top_k: int = 5) -> list[Prediction] | list[list[Prediction] | ImageError]:
        """The most probable labels of one image or of several.

        Args:
            images: one or several that `PoolFormerImageProcessor.read` takes.
            top_k: number of labels, at most the number of classes.

        Returns:
            For one image, its predictions, most probable first. For several images, a list of these in the same order;
            an image that cannot be read has an ImageError instead.

        Raises:
            ImageError: if a single image cannot be read.
        """
        if not is_one_image(images):
            return list(self.stream(images, top_k))
        check_at_least_one(top_k=top_k)
        return self._most_probable(self._images.one(images), top_k)

    def stream(self, images: Iterable[ImageLike], top_k: int = 5) -> Generator[list[Prediction] | ImageError]:
        """As `__call__`, for any number of images, one result at a time in the order given.

        At most four batches are in memory: one being decoded, one complete, two on the devices. The first result comes
        after up to three batches have been read. An exception of `images` is raised here, after the results of the
        images before it. `images` may reuse an array or a Pillow image for the next one.

        Raises:
            ValueError: for one image instead of an iterable of them.
        """
        check_at_least_one(top_k=top_k)
        return self._images.many(images, partial(self._most_probable, top_k=top_k))

    def _most_probable(self, probabilities: Float32[np.ndarray, " labels"], top_k: int) -> list[Prediction]:
        best = np.argsort(-probabilities, stable=True)[:top_k]
        return [Prediction(self.id2label[int(index)], float(probabilities[index])) for index in best]


def _probability_network(
    fold_parameters: bool,
    config: PoolFormerConfig,
    variables: Mapping[str, Any],
    mesh: Mesh,
    dtype: Dtype,
    image_size: tuple[int, int],
    kernels: KernelMode,
) -> tuple[Apply, Any]:
    """A `program.MakeNetwork` of the probabilities of all classes, float32 [batch, labels]."""
    if fold_parameters:
        network, params = fastest_network(config, variables, mesh, dtype, image_size, kernels)
    else:
        network, params = trained_network(config, variables, dtype)
    return partial(_probabilities, config, network), params


def _probabilities(
    config: PoolFormerConfig, network: Apply, params: Any, values: Float32[Array, "b h w c"]
) -> Float32[Array, "b labels"]:
    return probabilities(config, network(params, values))

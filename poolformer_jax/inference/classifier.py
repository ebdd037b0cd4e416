"""`ImageClassifier`: images in, labels out, compiled once per batch size.

While the devices compute one batch (`program`), threads decode the next.
"""

import collections
import itertools
import os
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import Array, Float32, UInt8
from PIL import Image

from poolformer_jax.errors import InputError
from poolformer_jax.fields import INTEGER
from poolformer_jax.images import ImageError, ImageLike, PoolFormerImageProcessor, is_one_image, read_image
from poolformer_jax.inference.program import CompiledClassifier
from poolformer_jax.network import PoolFormerConfig, names_by_index
from poolformer_jax.network.fused import KernelMode
from poolformer_jax.process import available_cores
from poolformer_jax.weights import build_model, class_names, open_model


class Prediction(NamedTuple):
    """A class and its probability."""

    label: str
    probability: float


class ImageClassifier:
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

    Raises:
        ValueError: if the network has fewer than two labels, or the preprocessing does not fit it.
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
    ) -> None:
        devices = jax.local_devices() if devices is None else devices
        threads = available_cores() if decode_threads is None else decode_threads
        names = class_names(config) if id2label is None else names_by_index(id2label)
        _check(config, image_processor, dtype, names)
        _check_at_least_one(batch_size=batch_size, decode_threads=threads, devices=len(devices))
        self.config = config
        self.image_processor = image_processor
        self.id2label = names
        self.decode_threads = threads
        self._probabilities = CompiledClassifier(
            config,
            variables,
            image_processor,
            dtype=dtype,
            batch_size=batch_size,
            fold_parameters=fold_parameters,
            kernels=kernels,
            devices=devices,
        )
        self.batch_sizes = self._probabilities.batch_sizes

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        image_processor: PoolFormerImageProcessor | None = None,
        compilation_cache_dir: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> "ImageClassifier":
        """The classifier with published or trained weights.

        Args:
            source: a name on the Hub ("sail/poolformer_s12"), a model folder, or a weights file.
            image_processor: the preprocessing; by default the one saved with the weights, or else that of the
                published variant of this architecture.
            compilation_cache_dir: folder in which compiled programs are kept for the next process. It becomes jax's
                compilation cache for the whole process.
            options: the constructor's (dtype, batch_size, ...), and revision, cache_dir, local_files_only, token and
                use_ema as in `load_pretrained`.

        Raises:
            ValueError: if the preprocessing is unknown.
        """
        if compilation_cache_dir is not None:
            keep_compiled_programs(compilation_cache_dir)
        opened = open_model(source, **{name: options.pop(name) for name in _OPEN_OPTIONS if name in options})
        model, variables = build_model(opened)
        return cls(model.config, variables, image_processor or opened.image_processor, **options)

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
            images: anything that `PoolFormerImageProcessor.preprocess` takes.
            top_k: number of labels, at most the number of classes.

        Returns:
            For one image, its predictions, most probable first. For several images, a list of these in the same order;
            an image that cannot be read has an ImageError instead.

        Raises:
            ImageError: if a single image cannot be read.
        """
        if not is_one_image(images):
            return list(self.stream(images, top_k))
        _check_at_least_one(top_k=top_k)
        (probabilities,) = np.asarray(self._probabilities([self.image_processor.resize_and_crop(images)]))[:1]
        return self._most_probable(probabilities, top_k)

    def stream(self, images: Iterable[ImageLike], top_k: int = 5) -> Iterator[list[Prediction] | ImageError]:
        """As `__call__`, for any number of images, one result at a time in the order given.

        At most four batches are in memory: one being decoded, one complete, two on the devices. The first result comes
        after up to three batches have been read. An exception of `images` is raised here, after the results of the
        images before it. `images` may reuse an array or a Pillow image for the next one.

        Raises:
            ValueError: for one image instead of an iterable of them.
        """
        _check_at_least_one(top_k=top_k)
        if is_one_image(images):  # a path is an iterable of characters, an array one of rows
            raise InputError(
                f"images is one image, of type {type(images).__name__}. Expected an iterable of images: stream "
                "[image], or call the classifier with it; of an array of many, stream list(array)."
            )
        return self._stream(images, top_k)

    def _stream(self, images: Iterable[ImageLike], top_k: int) -> Iterator[list[Prediction] | ImageError]:
        running: collections.deque[tuple[list[ImageError | None], Array | None]] = collections.deque()
        failures: list[Exception] = []
        # The threads end with the stream, not when it is garbage-collected.
        with closing(self._decode(_until_failure(images, failures))) as decoded:
            for batch in _batches(decoded, self.batch_sizes[-1]):
                running.append(self._start(batch))
                if len(running) > 1:  # the devices compute this batch while the one before is returned
                    yield from self._finish(*running.popleft(), top_k)
        while running:
            yield from self._finish(*running.popleft(), top_k)
        if failures:
            raise failures[0]

    def _decode(self, images: Iterable[ImageLike]) -> Generator[UInt8[np.ndarray, "h w c"] | ImageError]:
        """Every image read, resized and cropped, in order, by threads that are one batch ahead."""
        ahead: collections.deque[Future[UInt8[np.ndarray, "h w c"] | ImageError]] = collections.deque()
        pool = ThreadPoolExecutor(self.decode_threads, thread_name_prefix="decode")
        # A local name, because at exit the interpreter clears module globals before unfinished generators.
        is_finalizing = sys.is_finalizing
        try:
            for image in images:
                ahead.append(pool.submit(self._read, self._copy(image)))
                if len(ahead) > self.batch_sizes[-1]:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            if not is_finalizing():
                pool.shutdown(cancel_futures=True)

    def _copy(self, image: ImageLike) -> ImageLike | ImageError:
        """The image in a form that the caller cannot change by reusing a buffer, seeking to a frame or closing a file.

        Also, two threads must not load the same Pillow image.
        """
        if isinstance(image, str | os.PathLike | bytes):
            return image
        if isinstance(image, bytearray | memoryview):
            return bytes(image)
        try:
            return read_image(image, self.image_processor.num_channels)
        except ImageError as error:
            return error

    def _read(self, image: ImageLike | ImageError) -> UInt8[np.ndarray, "h w c"] | ImageError:
        if isinstance(image, ImageError):
            return image
        try:
            return self.image_processor.resize_and_crop(image)
        except ImageError as error:
            return error

    def _start(
        self, batch: list[UInt8[np.ndarray, "h w c"] | ImageError]
    ) -> tuple[list[ImageError | None], Array | None]:
        """Starts a batch on the devices without waiting: the error of every position, and the probabilities."""
        errors = [item if isinstance(item, ImageError) else None for item in batch]
        pixels = [item for item in batch if not isinstance(item, ImageError)]
        if not pixels:
            return errors, None
        return errors, self._probabilities(pixels)

    def _finish(
        self, errors: list[ImageError | None], probabilities: Array | None, top_k: int
    ) -> Iterator[list[Prediction] | ImageError]:
        rows = iter([] if probabilities is None else np.asarray(probabilities))
        for error in errors:
            yield self._most_probable(next(rows), top_k) if error is None else error

    def _most_probable(self, probabilities: Float32[np.ndarray, " labels"], top_k: int) -> list[Prediction]:
        best = np.argsort(-probabilities, stable=True)[:top_k]
        return [Prediction(self.id2label[int(index)], float(probabilities[index])) for index in best]


def keep_compiled_programs(folder: str | os.PathLike[str]) -> None:
    """Makes `folder` jax's persistent compilation cache, for programs of any size and compile time."""
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "jax_compilation_cache_dir": os.fspath(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # jax would keep using the folder of the first program


_OPEN_OPTIONS = ("revision", "cache_dir", "local_files_only", "token", "use_ema")


def _check(
    config: PoolFormerConfig, image_processor: PoolFormerImageProcessor, dtype: Dtype, id2label: Mapping[int, str]
) -> None:
    problems = []
    if dtype not in ("float32", "bfloat16", jnp.float32, jnp.bfloat16):
        problems.append(f"dtype={dtype!r}: expected float32 or bfloat16.")
    if config.num_labels == 0:
        problems.append("The network has no head (num_labels=0): expected at least two labels. Call the model instead.")
    if config.problem_type == "regression":
        problems.append(
            "problem_type='regression' has no probabilities: expected a classifier. Call the model instead."
        )
    elif config.num_labels == 1 and config.problem_type is None:
        problems.append(
            "The network has a single label (num_labels=1), whose probability would always be 1: expected at least two "
            "labels. Call the model for its logits."
        )
    if image_processor.num_channels != config.num_channels:
        problems.append(
            f"The preprocessing makes {image_processor.num_channels} channels and the network takes "
            f"{config.num_channels}: expected image_mean and image_std to have one value per channel."
        )
    if (size := image_processor.output_size) is None:
        problems.append(
            "The preprocessing makes images of different sizes: expected one size. Set do_center_crop=True."
        )
    elif min(size) < config.smallest_side or (config.image_size is not None and size != (config.image_size,) * 2):
        wanted = config.image_size or f"at least {config.smallest_side}"
        problems.append(f"The preprocessing makes images of {size}: expected {wanted} pixels. Change its crop_size.")
    if unnamed := sorted(set(range(config.num_labels)) - set(id2label)):
        problems.append(f"id2label has no name for class {unnamed[0]}: expected one for each of {config.num_labels}.")
    if problems:
        raise InputError("\n".join(problems))


def _check_at_least_one(**counts: int) -> None:
    if wrong := [f"{name}={count!r}" for name, count in counts.items() if not (INTEGER.accepts(count) and count >= 1)]:
        raise InputError(f"{', '.join(wrong)}: expected a whole number, at least 1.")


def _until_failure(images: Iterable[ImageLike], failures: list[Exception]) -> Iterator[ImageLike]:
    """Yields images until the iterable raises an exception, and appends that to `failures`."""
    try:
        yield from images
    except Exception as error:
        failures.append(error)


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(itertools.islice(items, size)):
        yield batch

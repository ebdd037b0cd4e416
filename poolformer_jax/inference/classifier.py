"""Images in, labels out: an image classifier that is compiled once per batch size and keeps every device busy.

While the devices compute one batch (`probabilities`), threads decode the next.
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
from poolformer_jax.hub import NotInCache
from poolformer_jax.images.imagenet_labels import imagenet_labels
from poolformer_jax.images.processor import PoolFormerImageProcessor, is_one_image
from poolformer_jax.images.reading import ImageError, ImageLike, read_image
from poolformer_jax.inference.program import CompiledClassifier
from poolformer_jax.network import PoolFormerConfig, published_variant
from poolformer_jax.network.fused import KernelMode
from poolformer_jax.process import available_cores
from poolformer_jax.weights.pretrained import load_pretrained


class Prediction(NamedTuple):
    """A class and how probable the network finds it."""

    label: str
    probability: float


class ImageClassifier:
    """Classifies images with the most probable labels.

    Every batch is padded to one of `batch_sizes`, so that a stream of any length compiles at most
    `len(classifier.batch_sizes)` programs. Batches are sharded over the devices, parameters are on each of them.

    Args:
        config: the architecture.
        variables: `{"params": tree}`.
        image_processor: the preprocessing; its results must have one size.
        id2label: class names by index; by default the config's, or ImageNet's for a published architecture with 1000
            classes, or "class 0", "class 1", ...
        dtype: type that feature maps are computed in, float32 or bfloat16.
        batch_size: images per batch, rounded up to a multiple of the number of devices. Of several CPU devices the
            first also takes an image that comes alone, and with batch_size=1 every image.
        fold_parameters: whether to compute with the folded network (see `folding`), or, in bfloat16 on devices that
            have them, with kernels; it is the same function. False computes the network as it was trained.
        kernels: whether to use Pallas kernels with `fold_parameters` in bfloat16, on TPUs v5e and v6e and NVIDIA GPUs
            from Ampere on. "auto" compares them with XLA on the devices first, which takes seconds, and warns and
            leaves all to XLA if they differ; "on" does not compare; "off" uses none.
        devices: what to compute on; by default all devices of this process.
        decode_threads: threads that decode and resize; by default one for each core that this process may use.

    Raises:
        ValueError: for a network without a head or of a single label, or preprocessing that does not fit it.
        WeightsMismatch: if the variables are not those of such a network.
    """

    def __init__(
        self,
        config: PoolFormerConfig,
        variables: Mapping[str, Any],
        image_processor: PoolFormerImageProcessor,
        *,
        id2label: Mapping[int, str] | None = None,
        dtype: Dtype = jnp.float32,
        batch_size: int = 32,
        fold_parameters: bool = True,
        kernels: KernelMode = "auto",
        devices: Sequence[jax.Device] | None = None,
        decode_threads: int | None = None,
    ) -> None:
        devices = jax.local_devices() if devices is None else devices
        threads = available_cores() if decode_threads is None else decode_threads
        names = class_names(config) if id2label is None else dict(id2label)
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
        """The classifier of published or trained weights.

        Args:
            source: a name on the Hub ("sail/poolformer_s12"), a model folder, or a weights file.
            image_processor: the preprocessing; by default what `source` has written down, or else what the published
                variant of this architecture was evaluated with.
            compilation_cache_dir: a folder that keeps compiled programs for the next process. This sets jax's cache,
                for the whole process.
            options: the constructor's (dtype, batch_size, ...), and revision, cache_dir, local_files_only, token and
                use_ema as in `load_pretrained`.

        Raises:
            ValueError: if no preprocessing is known for the weights.
        """
        if compilation_cache_dir is not None:
            keep_compiled_programs(compilation_cache_dir)
        load_options = {name: options.pop(name) for name in (*_HUB_OPTIONS, "use_ema") if name in options}
        model, variables = load_pretrained(source, **load_options)
        if image_processor is None:
            hub_options = {name: value for name, value in load_options.items() if name in _HUB_OPTIONS}
            image_processor = find_image_processor(source, model.config, **hub_options)
        return cls(model.config, variables, image_processor, **options)

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
            images: anything `PoolFormerImageProcessor.preprocess` takes.
            top_k: how many labels, at most the number of classes.

        Returns:
            For one image, its predictions with the most probable first. For several, a list of these in the order
            given, with an ImageError in the place of an image that cannot be read.

        Raises:
            ImageError: if the one image given cannot be read.
        """
        if not is_one_image(images):
            return list(self.stream(images, top_k))
        _check_at_least_one(top_k=top_k)
        (probabilities,) = np.asarray(self._probabilities([self.image_processor.resize_and_crop(images)]))[:1]
        return self._most_probable(probabilities, top_k)

    def stream(self, images: Iterable[ImageLike], top_k: int = 5) -> Iterator[list[Prediction] | ImageError]:
        """As `__call__`, one result at a time for images of any number, in the order given.

        At most four batches are held at a time: one being decoded, one assembled, two on the devices; so the first
        result comes after up to three of them are read. What `images` itself raises is raised here, after the results
        of the images that came before. Once `images` has gone on, an array or a Pillow image that it gave may change.

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
        # Closed at once, not when it is collected: the threads end with the stream.
        with closing(self._decode(_until_failure(images, failures))) as decoded:
            for batch in _batches(decoded, self.batch_sizes[-1]):
                running.append(self._start(batch))
                if len(running) > 1:  # the devices work on the batch just started while the one before is reported
                    yield from self._finish(*running.popleft(), top_k)
        while running:
            yield from self._finish(*running.popleft(), top_k)
        if failures:
            raise failures[0]

    def _decode(self, images: Iterable[ImageLike]) -> Generator[UInt8[np.ndarray, "h w c"] | ImageError]:
        """Every image read, resized and cropped by threads that keep one batch ahead; in order."""
        ahead: collections.deque[Future[UInt8[np.ndarray, "h w c"] | ImageError]] = collections.deque()
        pool = ThreadPoolExecutor(self.decode_threads, thread_name_prefix="decode")
        # Kept here: when the interpreter ends, modules lose their names, and threads are gone.
        ending = sys.is_finalizing
        try:
            for image in images:
                ahead.append(self._submit(pool, image))
                if len(ahead) > self.batch_sizes[-1]:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            if not ending():
                pool.shutdown(cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, image: ImageLike) -> Future[UInt8[np.ndarray, "h w c"] | ImageError]:
        """Has an image read by the threads, as it is now."""
        try:
            image = self._fixed(image)
            return pool.submit(self._read, image)
        except ImageError as error:
            outcome: UInt8[np.ndarray, "h w c"] | ImageError = error
        except RuntimeError:  # threads cannot be started once the main one has ended, and others may go on
            outcome = self._read(image)
        done: Future[UInt8[np.ndarray, "h w c"] | ImageError] = Future()
        done.set_result(outcome)
        return done

    def _fixed(self, image: ImageLike) -> ImageLike:
        """The image as nobody can change it: whoever gave it may go on to another frame, or close the file.

        A Pillow image that is not loaded yet must not be read by two threads either.
        """
        if isinstance(image, str | os.PathLike | bytes):
            return image
        if isinstance(image, bytearray | memoryview):
            return bytes(image)
        return read_image(image, self.image_processor.num_channels)

    def _read(self, image: ImageLike) -> UInt8[np.ndarray, "h w c"] | ImageError:
        try:
            return self.image_processor.resize_and_crop(image)
        except ImageError as error:
            return error

    def _start(
        self, batch: list[UInt8[np.ndarray, "h w c"] | ImageError]
    ) -> tuple[list[ImageError | None], Array | None]:
        """Hands a batch to the devices without waiting for them: the errors by position, and the probabilities."""
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
    """Sets jax's persistent compilation cache to `folder`, for programs of any size and compile time."""
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "jax_compilation_cache_dir": os.fspath(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # or jax stays with the folder of the first program


def find_image_processor(
    source: str | os.PathLike[str], config: PoolFormerConfig, **hub_options: Any
) -> PoolFormerImageProcessor:
    """The preprocessing written down at `source`, or else that of the published variant of this architecture.

    Raises:
        ValueError: if there is neither, or the Hub's cache lacks it and the Hub cannot be asked.
    """
    try:
        return PoolFormerImageProcessor.from_pretrained(source, **hub_options)
    except FileNotFoundError as error:
        variant = None if isinstance(error, NotInCache) else published_variant(config)
        if variant is None:
            raise InputError(f"{error} Or pass image_processor=PoolFormerImageProcessor(...).") from error
    return PoolFormerImageProcessor.for_variant(variant)


_HUB_OPTIONS = ("revision", "cache_dir", "local_files_only", "token")


def class_names(config: PoolFormerConfig) -> dict[int, str]:
    """The config's names, or ImageNet's for a published architecture with 1000 classes, or numbers."""
    if config.id2label is not None:
        return dict(config.id2label)
    if config.num_labels == 1000 and published_variant(config) is not None:
        return imagenet_labels()
    return {index: f"class {index}" for index in range(config.num_labels)}


def _check(
    config: PoolFormerConfig, image_processor: PoolFormerImageProcessor, dtype: Dtype, id2label: Mapping[int, str]
) -> None:
    problems = []
    if dtype not in ("float32", "bfloat16", jnp.float32, jnp.bfloat16):
        problems.append(f"dtype={dtype!r}: expected float32 or bfloat16.")
    if config.num_labels == 0:
        problems.append("The network has no head (num_labels=0): expected at least one label. Call the model instead.")
    if config.num_labels == 1:
        problems.append(
            "The network has a single label (num_labels=1), which would have a probability of 1 in every image: "
            "expected at least two. Call the model for its logits."
        )
    if image_processor.num_channels != config.num_channels:
        problems.append(
            f"The preprocessing makes {image_processor.num_channels} channels and the network takes "
            f"{config.num_channels}: expected image_mean and image_std to have one value per channel."
        )
    if (size := image_processor.output_size) is None:
        problems.append("The preprocessing makes images of many sizes: expected one. Set do_center_crop=True.")
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
    """The images up to an exception of theirs, which is put into `failures`."""
    try:
        yield from images
    except Exception as error:
        failures.append(error)


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(itertools.islice(items, size)):
        yield batch

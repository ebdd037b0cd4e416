"""Images of any number through a program: while the devices compute one batch, threads decode the next.

`open_stream` makes the program that `ImageClassifier`, `ImageEmbedder` and `pipeline` use, from the options that they
share.
"""

import collections
import itertools
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax.sharding import Mesh
from jaxtyping import Array, UInt8

from poolformer_jax.errors import InputError
from poolformer_jax.fields import INTEGER
from poolformer_jax.images import ImageError, ImageLike, PoolFormerImageProcessor, is_one_image
from poolformer_jax.inference.program import Apply, BatchProgram, MakeNetwork, normalized
from poolformer_jax.inference.runtimes import RuntimeProgram, check_runtime
from poolformer_jax.inference.verification import check_finite
from poolformer_jax.network import PoolFormerConfig, check_dtype
from poolformer_jax.network.fused import KernelMode
from poolformer_jax.process import check_not_forked
from poolformer_jax.resources import available_cores


class ImageStream:
    """Reads images and computes a row of a program's output for each."""

    def __init__(
        self, program: BatchProgram | RuntimeProgram, image_processor: PoolFormerImageProcessor, decode_threads: int
    ) -> None:
        self.program, self.decode_threads = program, decode_threads
        self._image_processor = image_processor

    def warm_up(self) -> None:
        """Computes a batch of every size, which compiles its program."""
        size = self._image_processor.output_size
        assert size is not None, "open_stream checks it"
        blank = np.zeros((*size, self._image_processor.num_channels), np.uint8)
        for images in self.program.batch_sizes:
            jax.block_until_ready(self.program([blank] * images))

    def one(self, image: ImageLike) -> Any:
        """The row of one image. Raises ImageError if it cannot be read; InputError in a process that was forked."""
        check_not_forked()
        return _row(jax.device_get(self.program([self._image_processor.resize_and_crop(image)])), 0)

    def many(self, images: Iterable[ImageLike], result: Callable[[Any], Any] = lambda row: row) -> Generator[Any]:
        """`result` of the row, or an ImageError, for every image, in order.

        At most four batches are in memory: one being decoded, one complete, two on the devices. An exception of
        `images` is raised here, after the rows of the images before it. Raises InputError for one image instead of an
        iterable of them, or in a process that was forked.
        """
        check_not_forked()
        if is_one_image(images):  # a path is an iterable of characters, an array one of rows
            raise InputError(
                f"images is one image, of type {type(images).__name__}. Expected an iterable of images: stream "
                "[image], or call with the image itself; of an array of many, stream list(array)."
            )
        return self._many(images, result)

    def _many(self, images: Iterable[ImageLike], result: Callable[[Any], Any]) -> Generator[Any]:
        running: collections.deque[tuple[list[ImageError | None], Any]] = collections.deque()
        failures: list[Exception] = []
        # The threads end with the stream, not when it is garbage-collected.
        with closing(self._decode(_until_failure(images, failures))) as decoded:
            for batch in _batches(decoded, self.program.batch_sizes[-1]):
                running.append(self._start(batch))
                if len(running) > 1:  # the devices compute this batch while the one before is returned
                    yield from _finish(result, *running.popleft())
        while running:
            yield from _finish(result, *running.popleft())
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
                if len(ahead) > self.program.batch_sizes[-1]:
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
            return self._image_processor.read(image)
        except ImageError as error:
            return error

    def _read(self, image: ImageLike | ImageError) -> UInt8[np.ndarray, "h w c"] | ImageError:
        if isinstance(image, ImageError):
            return image
        try:
            return self._image_processor.resize_and_crop(image)
        except ImageError as error:
            return error

    def _start(self, batch: list[UInt8[np.ndarray, "h w c"] | ImageError]) -> tuple[list[ImageError | None], Any]:
        """Starts a batch on the devices without waiting: the error of every position, and the output."""
        errors = [item if isinstance(item, ImageError) else None for item in batch]
        pixels = [item for item in batch if not isinstance(item, ImageError)]
        return errors, self.program(pixels) if pixels else None


def _finish(result: Callable[[Any], Any], errors: list[ImageError | None], output: Any) -> Iterator[Any]:
    output, rows = jax.device_get(output), itertools.count()
    for error in errors:
        yield result(_row(output, next(rows))) if error is None else error


def _row(output: Any, index: int) -> Any:
    row = jax.tree.map(lambda rows: rows[index], output)
    check_finite(*jax.tree.leaves(row))
    return row


def open_stream(
    config: PoolFormerConfig,
    variables: Mapping[str, Any],
    image_processor: PoolFormerImageProcessor,
    make_network: MakeNetwork,
    output: str,
    *,
    dtype: Dtype,
    batch_size: int,
    kernels: KernelMode,
    devices: Sequence[jax.Device] | None,
    decode_threads: int | None,
    runtime: str,
    **only_in_jax: bool,
) -> ImageStream:
    """A stream of the rows that a network computes of images.

    Args:
        config: the architecture.
        variables: `{"params": tree}`.
        image_processor: the preprocessing.
        make_network: the network for JAX; it is not called for another runtime.
        output: what another runtime computes, as in `RuntimeProgram`.
        dtype: this and the following options are as in `ImageClassifier`.
        batch_size: as in `ImageClassifier`.
        kernels: as in `ImageClassifier`.
        devices: as in `ImageClassifier`.
        decode_threads: as in `ImageClassifier`.
        runtime: as in `ImageClassifier`.
        only_in_jax: by name, whether a further option has a value that only JAX supports.

    Raises:
        InputError: for options or preprocessing that do not fit the network, or in a process that was forked.
        MissingDependencyError: if the runtime is not installed.
        WeightsMismatch: if the variables do not match the config.
    """
    changes_type = dtype not in ("float32", jnp.float32)
    check_runtime(runtime, dtype=changes_type, kernels=kernels == "on", devices=devices is not None, **only_in_jax)
    devices, threads, size = _check_options(config, image_processor, dtype, batch_size, devices, decode_threads)
    program: BatchProgram | RuntimeProgram
    if runtime == "jax":
        mesh = Mesh(np.asarray(devices), ("batch",))
        network, params = make_network(config, variables, mesh, dtype, size, kernels)
        program = BatchProgram(partial(_normalize_and_apply, image_processor, network), params, batch_size, mesh)
    else:
        program = RuntimeProgram(runtime, config, variables, image_processor, output=output, batch_size=batch_size)
    return ImageStream(program, image_processor, threads)


def _normalize_and_apply(
    image_processor: PoolFormerImageProcessor, network: Apply, params: Any, pixels: UInt8[Array, "b h w c"]
) -> Any:
    return network(params, normalized(image_processor, pixels))


def _check_options(
    config: PoolFormerConfig,
    image_processor: PoolFormerImageProcessor,
    dtype: Dtype,
    batch_size: int,
    devices: Sequence[jax.Device] | None,
    decode_threads: int | None,
) -> tuple[Sequence[jax.Device], int, tuple[int, int]]:
    """The devices, the number of threads, and height and width of the images; None stands for the default.

    The errors are those of `open_stream`.
    """
    check_not_forked()
    devices = jax.local_devices() if devices is None else devices
    threads = available_cores() if decode_threads is None else decode_threads
    check_dtype(dtype)
    check_at_least_one(batch_size=batch_size, decode_threads=threads)
    if not 0 < len(devices) == len(set(devices)):
        raise InputError(f"devices={list(devices)}: expected one device or more, each once.")
    return devices, threads, _image_size(config, image_processor)


def check_at_least_one(**counts: int) -> None:
    """Raises InputError unless all of the numbers are whole and at least 1."""
    if wrong := [f"{name}={count!r}" for name, count in counts.items() if not (INTEGER.accepts(count) and count >= 1)]:
        raise InputError(f"{', '.join(wrong)}: expected a whole number, at least 1.")


def _image_size(config: PoolFormerConfig, image_processor: PoolFormerImageProcessor) -> tuple[int, int]:
    """Height and width of the images that the preprocessing makes.

    Raises InputError, naming every reason, unless the network takes these images.
    """
    problems, size = [], image_processor.output_size
    if image_processor.num_channels != config.num_channels:
        problems.append(
            f"The preprocessing makes {image_processor.num_channels} channels and the network takes "
            f"{config.num_channels}: expected image_mean and image_std to have one value per channel."
        )
    if size is None:
        problems.append(
            "The preprocessing makes images of different sizes: expected one size. Set do_center_crop=True."
        )
    elif min(size) < config.smallest_side or (config.image_size is not None and size != (config.image_size,) * 2):
        wanted = config.image_size or f"at least {config.smallest_side}"
        problems.append(f"The preprocessing makes images of {size}: expected {wanted} pixels. Change its crop_size.")
    if size is None or problems:
        raise InputError("\n".join(problems))
    return size


def _until_failure(images: Iterable[ImageLike], failures: list[Exception]) -> Iterator[ImageLike]:
    """Yields images until the iterable raises an exception, and appends that to `failures`."""
    try:
        yield from images
    except Exception as error:
        failures.append(error)


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(itertools.islice(items, size)):
        yield batch

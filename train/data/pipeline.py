"""The Grain pipeline: makes batches of a source that depend on (seed, step) alone.

    example indices -> shuffled anew every epoch, without end -> paired with their global position g
    -> local batches, of which process p of P takes every P-th, starting at p -> read, decoded, transformed by workers

With balanced sampling the order of the first line is that of `balance.BalancedOrder`.

Everything before the reading is index arithmetic, so starting at a late step costs nothing. A worker makes whole
batches, and Grain returns them in the same order for any number of workers.
"""

import atexit
import dataclasses
import functools
import gc
import itertools
import logging
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Self

import grain
import numpy as np
from absl import flags
from grain.multiprocessing import SharedMemoryArray
from jaxtyping import Int

from poolformer_jax.errors import InputError
from poolformer_jax.images import ImageError, PoolFormerImageProcessor
from poolformer_jax.process import available_cores
from train.data.augment.resizing import choose_resizer
from train.data.augment.transforms import TrainingTransform
from train.data.balance import BalancedOrder
from train.data.config import DataConfig
from train.data.sources.source import ArraySource, Example, Source, image_of
from train.data.workers.failures import is_worker_failure, worker_error
from train.data.workers.segments import free_abandoned_segments, segment_prefix
from train.data.workers.start import initialize_worker, start_workers_without_jax

Batch = dict[str, np.ndarray]
_LOG = logging.getLogger(__name__)
_MAX_BAD_IN_A_ROW = 100
# Examples. Grain's own endless data set has too many for batches of one image.
_ENDLESS = 1 << 62


class BadImageError(InputError):
    """An image of the data set that cannot be read; the message names it."""


class LabelError(InputError):
    """A label that is not a class of the data set, such as the -1 of splits without labels."""


class Batches:
    """An iterator over batches, which must be closed; it also lists the images that it could not read."""

    def __init__(
        self,
        batches: grain.MapDataset[Batch],
        config: DataConfig,
        source: Source,
        repeat: bool = False,
        image_processor: PoolFormerImageProcessor | None = None,
    ) -> None:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, which only programs based on absl parse
        self._workers = worker_count(config, source, len(batches))
        if self._workers:
            _free_shared_memory_at_exit()
        # A list that the finalizer empties: Grain's iterators warn if they are still open when the interpreter exits.
        self._iterator = [iter(_prefetch(batches, config, self._workers, repeat))]
        self._finalizer = weakref.finalize(self, _close, self._iterator)
        self._source, self._image_processor = source, image_processor or config.image_processor()
        self.bad_images: dict[str, str] = {}
        """Reason for every image that was replaced or left out so far, by the image's id."""

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._iterator:
            raise InputError("These batches are closed. Make new ones that start at the next step.")
        try:
            batch = next(self._iterator[0])
        except (RuntimeError, OSError) as error:
            if self._workers and is_worker_failure(error):
                raise worker_error(error) from error
            raise
        self._report(batch.pop("bad"))
        return batch

    def _report(self, bad: np.ndarray) -> None:
        """Workers return the indices of bad images only. This finds the reasons, once for every image."""
        for index in bad[bad >= 0]:
            name = f"{index}"
            try:
                example = self._source[int(index)]
                name = example["id"]
                if name in self.bad_images:
                    continue
                self._image_processor.resize_and_crop(image_of(example))
                reason = "a worker could not read it; it is readable now"
            except ImageError as error:
                reason = str(error)
            self.bad_images[name] = reason
            _LOG.warning("Skipped a bad image, %d so far: %s: %s", len(self.bad_images), name, reason)

    def close(self) -> None:
        """Stops the workers. No more batches can be read."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close(iterator: list[grain.DatasetIterator[Batch]]) -> None:
    while iterator:
        iterator.pop().close()


@functools.cache
def _free_shared_memory_at_exit() -> None:
    """Frees the last batches before Python exits; its resource tracker would warn of leaked shared memory.

    Cycles of references keep some of them, and Grain frees arrays in a thread that Python does not wait for.
    """

    def free() -> None:
        pool = SharedMemoryArray._del_thread_pool
        SharedMemoryArray._disable_async_del()
        gc.collect()
        if pool is not None:
            pool.close()
            pool.join()

    atexit.register(free)


def train_batches(
    config: DataConfig, source: Source, *, start_step: int = 0, process_index: int = 0, process_count: int = 1
) -> Batches:
    """This process's part of the training batches, without end, starting at `start_step`.

    Every batch is {"image": uint8 [b, H, W, C], "label": int32 [b], "index": int64 [b]} with b = batch_size /
    process_count; index is the example's place in the source. For several classes per image, or regression, "label" is
    the targets, float32 [b, k]. A batch is a pure function of (config.seed, step), as the package's docstring says.

    Raises:
        ValueError: if the batch size is not a multiple of process_count, or the resizer is not installed.
        BadImageError: from next(), for an image that cannot be read, with on_bad_image="error".
        LabelError: from next(), for a label that is not a class.
        WorkerError: from next(), if a worker process failed.
    """
    choose_resizer(config.augment.resizer)  # raises here rather than in a worker if it is not installed
    local = _local_places(config, source, start_step, process_index, process_count)
    return Batches(local.map(_MakeTrainingBatch(config, source)), config, source)


def train_places(
    config: DataConfig, source: Source, *, start_step: int = 0, process_index: int = 0, process_count: int = 1
) -> Iterator[Int[np.ndarray, " b"]]:
    """The places in `source` of the examples of each batch of `train_batches`."""
    local = _local_places(config, source, start_step, process_index, process_count)
    return (np.array([place.index for place in local[step]]) for step in itertools.count())


def _local_places(
    config: DataConfig, source: Source, start_step: int, process_index: int, process_count: int
) -> grain.MapDataset[list["_Place"]]:
    """The examples of this process's part of each training batch."""
    size = _local_size(config.batch_size, process_count)
    numbers, epochs = grain.MapDataset.range(len(source)), _ENDLESS // len(source)
    if config.sampling == "balanced":
        places = numbers.repeat(epochs).map_with_index(_Balanced(BalancedOrder(source, config.seed)))
    else:
        places = numbers.shuffle(seed=_shuffle_seed(config.seed)).repeat(epochs).map_with_index(_Place)
    indices = places.batch(size, batch_fn=list)
    return indices[start_step * process_count + process_index :: process_count]


def evaluation_batches(
    config: DataConfig,
    source: Source,
    *,
    image_processor: PoolFormerImageProcessor | None = None,
    repeat: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """This process's part of the batches that hold every example once, in order.

    Batches are as in training, with "mask": bool [b], False for the rows that fill up the last batch and for images
    that on_bad_image="skip" leaves out. Every process gets the same number of batches of the same size. With `repeat`
    they start again every `evaluation_steps`, without end: workers, which take a second to start, then wait between two
    evaluations with the next batches ready. `image_processor` replaces the config's; all of its results must have one
    size.

    Raises:
        ValueError: if the batch size is not a multiple of process_count.
        BadImageError: from next(), for an image that cannot be read, with on_bad_image="error".
        LabelError: from next(), for a label that is not a class.
        WorkerError: from next(), if a worker process failed.
    """
    size = _local_size(config.evaluation_size, process_count)
    indices = grain.MapDataset.range(evaluation_steps(config, source) * config.evaluation_size).batch(
        size, batch_fn=list
    )
    local = indices[process_index::process_count]
    image_processor = image_processor or config.image_processor()
    make_batch = _MakeEvaluationBatch(config, source, image_processor)
    return Batches(local.map(make_batch), config, source, repeat, image_processor)


def evaluation_steps(config: DataConfig, source: Source) -> int:
    """The number of batches in an evaluation, the same for every process."""
    return -(-len(source) // config.evaluation_size)


def worker_count(config: DataConfig, source: Source, batches: int | None = None) -> int:
    """The number of worker processes; 0 if a thread of this process makes the batches.

    By default one for every core but one, none for data sets in memory, and no more than there are batches.
    """
    workers = max(1, available_cores() - 1) if config.workers is None else config.workers
    if config.workers is None and isinstance(source, ArraySource):
        workers = 0  # sending a batch between processes takes longer than making it
    return workers if batches is None else min(workers, batches)


def batch_bytes(config: DataConfig, size: int) -> int:
    """Bytes of the pixels of `size` images."""
    return size * config.image_size**2 * config.num_channels


def max_shared_batches(workers: int, worker_batches: int) -> int:
    """The most batches that are in shared memory at a time.

    For every worker: `worker_batches` in its queue, as many that Grain has read ahead from it, and one that each side
    waits to pass on. One more is in use.
    """
    return workers * 2 * (worker_batches + 1) + 1 if workers else 0


@dataclasses.dataclass(frozen=True)
class _Place:
    """One training example: its global position, which keys its random numbers, and its index in the source."""

    position: int
    index: int


@dataclasses.dataclass(frozen=True)
class _Balanced:
    """Makes the place at a position of the balanced order."""

    order: BalancedOrder

    def __call__(self, position: int, _: int) -> _Place:
        return _Place(position, self.order(position))


@dataclasses.dataclass(frozen=True)
class _MakeTrainingBatch:
    """Makes a batch from places. Runs in the workers."""

    config: DataConfig
    source: Source

    def __call__(self, places: Sequence[_Place]) -> Batch:
        transform = TrainingTransform(self.config)
        examples = self.source.__getitems__([place.index for place in places])
        batch = _empty_batch(self.config, self.source, len(places), (self.config.image_size, self.config.image_size))
        for row, (place, example) in enumerate(zip(places, examples)):
            index = place.index
            while True:
                # A new generator for a replacement too: it does not depend on the draws for the bad image.
                rng = np.random.Generator(np.random.Philox(key=[self.config.seed, place.position]))
                try:
                    batch["image"][row] = transform(image_of(example), rng)
                    break
                except ImageError as error:
                    _raise_unless_skipped(self.config, example["id"], error)
                    batch["bad"][row] = place.index
                    if index - place.index == min(_MAX_BAD_IN_A_ROW, len(self.source) - 1):
                        raise BadImageError(
                            f"{index - place.index + 1} images in a row cannot be read, the last of them "
                            f"{example['id']}: {error}\nCheck the storage, or run python -m train doctor."
                        ) from error
                    index += 1
                    example = self.source[index % len(self.source)]
            batch["label"][row] = _label(example, self.source, self.config, self.config.train_split)
            batch["index"][row] = index % len(self.source)
        return batch


@dataclasses.dataclass(frozen=True)
class _MakeEvaluationBatch:
    """Makes a batch from indices; those beyond the end of the source fill it up. Runs in the workers."""

    config: DataConfig
    source: Source
    image_processor: PoolFormerImageProcessor

    def __call__(self, indices: Sequence[int]) -> Batch:
        real = [index for index in indices if index < len(self.source)]
        assert self.image_processor.output_size is not None
        batch = _empty_batch(self.config, self.source, len(indices), self.image_processor.output_size)
        batch["mask"] = np.zeros(len(indices), bool)
        for row, (index, example) in enumerate(zip(real, self.source.__getitems__(real))):
            batch["index"][row] = index
            batch["label"][row] = _label(example, self.source, self.config, self.config.evaluation_split)
            try:
                batch["image"][row] = self.image_processor.resize_and_crop(image_of(example))
                batch["mask"][row] = True
            except ImageError as error:
                _raise_unless_skipped(self.config, example["id"], error)
                batch["bad"][row] = index
        return batch


def _empty_batch(config: DataConfig, source: Source, size: int, image_size: tuple[int, int]) -> Batch:
    targets = np.zeros((size, len(source.class_names)), np.float32)
    return {
        "image": np.zeros((size, *image_size, config.num_channels), np.uint8),
        "label": targets if config.has_target_vectors else np.zeros(size, np.int32),
        "index": np.full(size, -1, np.int64),
        "bad": np.full(size, -1, np.int64),
    }


def _label(example: Example, source: Source, config: DataConfig, split: str) -> Any:
    label, classes = example["label"], len(source.class_names)
    if config.has_target_vectors:
        return label  # checked when the source was opened
    if not 0 <= label < classes:
        # Indexing with a negative label would silently count from the end.
        raise LabelError(
            f"{example['id']} in the split {split!r} has the label {label}. Expected 0 to {classes - 1}, because "
            f"the data set has {classes} classes. -1 marks a split without published labels: choose another split."
        )
    return label


def _raise_unless_skipped(config: DataConfig, name: str, error: ImageError) -> None:
    if config.on_bad_image == "error":
        raise BadImageError(
            f"The image {name} cannot be read: {error}\nReplace it, or skip and report such images with "
            "--data.on-bad-image skip (in evaluate: --on-bad-image skip)."
        ) from error


def _local_size(batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise InputError(
            f"A batch of {batch_size} images cannot be split evenly over {process_count} processes. Expected a "
            f"multiple of {process_count}."
        )
    return batch_size // process_count


def _shuffle_seed(seed: int) -> int:
    # Grain adds the epoch to its 32-bit seed. Spread out, the runs of two seeds share no epochs.
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


def _prefetch(
    batches: grain.MapDataset[Batch], config: DataConfig, workers: int, repeat: bool
) -> grain.IterDataset[Batch]:
    """The batches made ahead of time, by workers or by a thread of this process."""
    free_abandoned_segments()
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1 if workers else config.worker_batches)
    dataset = (batches.repeat() if repeat else batches).to_iter_dataset(options)
    if workers == 0:
        return dataset
    start_workers_without_jax()
    multiprocessing = grain.MultiprocessingOptions(workers, per_worker_buffer_size=config.worker_batches)
    return dataset.mp_prefetch(multiprocessing, worker_init_fn=functools.partial(initialize_worker, segment_prefix()))

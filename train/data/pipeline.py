"""The Grain chain: a source becomes batches that depend on (seed, step) and nothing else.

    record numbers -> shuffled anew every epoch, without end -> paired with their global position g
    -> local batches, of which process p of P takes every P-th from p on -> read, decoded, transformed -> workers

Everything before the reading is arithmetic on numbers, so starting at a late step costs nothing. A worker makes whole
batches, and Grain hands them out in order whatever the number of workers.
"""

import dataclasses
import logging
import os
import signal
import threading
import weakref
from collections.abc import Iterator, Sequence
from multiprocessing import parent_process
from typing import Self

import grain
import numpy as np
from absl import flags

from poolformer_jax.errors import InputError
from poolformer_jax.images.reading import ImageError
from poolformer_jax.process import available_cores
from train.data.augment.resizing import choose_resizer
from train.data.augment.transforms import TrainingTransform
from train.data.config import DataConfig
from train.data.sources.source import ArraySource, Example, Source, image_of
from train.data.workers.shared_memory import most_batches, require_room
from train.data.workers.worker_errors import loss_of_a_worker
from train.data.workers.worker_process import name_as_main_of_workers

Batch = dict[str, np.ndarray]
_LOG = logging.getLogger(__name__)
_MOST_BAD_IN_A_ROW = 100


class BadImageError(InputError):
    """An image of the data set that cannot be read; names it and says how to go on."""


class LabelError(InputError):
    """A label that is no class of the data set, as those of splits without labels are; names it."""


class Batches:
    """An iterator over batches that can be closed, and knows which images it could not read."""

    def __init__(
        self, batches: grain.MapDataset[Batch], config: DataConfig, source: Source, repeat: bool = False
    ) -> None:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, which only absl's own programs parse
        # Held in a list that the finalizer empties: an iterator of Grain that outlives the modules it was made of, at
        # the end of a program that did not close it, complains.
        self._running = [iter(_spread(batches, config, source, repeat))]
        self._finalizer = weakref.finalize(self, _stop, self._running)
        self._config, self._source = config, source
        self.bad_images: dict[str, str] = {}
        """Id and complaint of every image that was replaced or left out so far."""

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._running:
            raise InputError("These batches were closed. Make new ones from the step to go on with.")
        try:
            batch = next(self._running[0])
        except (RuntimeError, OSError) as error:
            if (told := loss_of_a_worker(error)) is None:
                raise
            raise told from error
        self._report(batch.pop("bad"))
        return batch

    def _report(self, bad: np.ndarray) -> None:
        """Workers only say where they were; what is wrong there is found out here, once for every image."""
        for index in bad[bad >= 0]:
            name = f"{index}"
            try:
                example = self._source[int(index)]
                name = example["id"]
                if name in self.bad_images:
                    continue
                self._config.image_processor().resize_and_crop(image_of(example))
                reason = "it was unreadable in a worker, and is readable now"
            except ImageError as error:
                reason = str(error)
            self.bad_images[name] = reason
            _LOG.warning("Skipped a bad image, %d so far: %s: %s", len(self.bad_images), name, reason)

    def close(self) -> None:
        """Stops the workers. Nothing more can be read."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _stop(running: list[grain.DatasetIterator[Batch]]) -> None:
    while running:
        running.pop().close()


def train_batches(
    config: DataConfig, source: Source, *, start_step: int = 0, process_index: int = 0, process_count: int = 1
) -> Batches:
    """This process's part of the training batches from `start_step` on, without end.

    Every batch is {"image": uint8 [b, H, W, C], "label": int32 [b], "index": int64 [b]}, b = batch_size /
    process_count; index counts the source's examples. It is a pure function of (config.seed, step): see the package's
    docstring.

    Raises:
        ValueError: if the batch size is not a multiple of process_count, the resizer is not installed, or shared
            memory has no room for a batch of workers.
        BadImageError: from next(), for an image that cannot be read, with on_bad_image="error".
        LabelError: from next(), for a label that is no class.
        WorkerError: from next(), if a worker process was ended from outside.
    """
    size = _local_size(config.batch_size, process_count)
    choose_resizer(config.augment.resizer)  # so that what is missing is said here, not by a worker
    numbers = (
        grain.MapDataset.range(len(source))
        .shuffle(seed=_shuffle_seed(config.seed))
        .repeat()
        .map_with_index(_Place)
        .batch(size, batch_fn=list)
    )
    mine = numbers[start_step * process_count + process_index :: process_count]
    _require_room(config, size, worker_count(config, source))
    return Batches(mine.map(_MakeTrainingBatch(config, source)), config, source)


def evaluation_batches(
    config: DataConfig, source: Source, *, repeat: bool = False, process_index: int = 0, process_count: int = 1
) -> Batches:
    """This process's part of the batches that hold every example once, in order.

    With `repeat` they begin again without end, every `evaluation_steps`: workers take a second to start, and wait
    between two evaluations, with the first batches of the next one ready.

    Batches are as in training, with "mask": bool [b]: False for what only fills the last batch up, and for images that
    on_bad_image="skip" leaves out. Every process gets the same number of batches of the same size.

    Raises:
        ValueError: if the batch size is not a multiple of process_count, or shared memory has no room for a batch of
            workers.
        BadImageError: from next(), for an image that cannot be read, with on_bad_image="error".
        LabelError: from next(), for a label that is no class.
        WorkerError: from next(), if a worker process was ended from outside.
    """
    whole = config.evaluation_batch_size or config.batch_size
    size = _local_size(whole, process_count)
    numbers = grain.MapDataset.range(evaluation_steps(config, source) * whole).batch(size, batch_fn=list)
    mine = numbers[process_index::process_count]
    _require_room(config, size, worker_count(config, source, len(mine)))
    return Batches(mine.map(_MakeEvaluationBatch(config, source)), config, source, repeat)


def evaluation_steps(config: DataConfig, source: Source) -> int:
    """How many batches of every process hold all examples of a source."""
    return -(-len(source) // (config.evaluation_batch_size or config.batch_size))


def worker_count(config: DataConfig, source: Source, batches: int | None = None) -> int:
    """How many worker processes make so many batches of a source, or batches without end; 0: a thread makes them."""
    workers = max(1, available_cores() - 1) if config.workers is None else config.workers
    if config.workers is None and isinstance(source, ArraySource):
        workers = 0  # its transforms take less time than the way to another process
    # An evaluation may have few batches, and a worker takes a second to start.
    return workers if batches is None else min(workers, batches)


def batch_bytes(config: DataConfig, size: int) -> int:
    """Bytes of a batch of so many images; of its other arrays, which are small, none."""
    return size * config.image_size**2 * config.num_channels


@dataclasses.dataclass(frozen=True)
class _Place:
    """One example of training: its global position, which keys its random numbers, and its number in the source."""

    position: int
    index: int


@dataclasses.dataclass(frozen=True)
class _MakeTrainingBatch:
    """From places to pixels. Runs in the workers."""

    config: DataConfig
    source: Source

    def __call__(self, places: Sequence[_Place]) -> Batch:
        transform = TrainingTransform(self.config)
        examples = self.source.__getitems__([place.index for place in places])
        batch = _empty_batch(self.config, len(places))
        for row, (place, example) in enumerate(zip(places, examples)):
            index = place.index
            while True:
                # Anew for a replacement, which then does not depend on how many numbers were drawn for the bad image.
                rng = np.random.Generator(np.random.Philox(key=[self.config.seed, place.position]))
                try:
                    batch["image"][row] = transform(image_of(example), rng)
                    break
                except ImageError as error:
                    _complain_or_go_on(self.config, example["id"], error)
                    batch["bad"][row] = place.index
                    if index - place.index == min(_MOST_BAD_IN_A_ROW, len(self.source) - 1):
                        raise BadImageError(
                            f"{index - place.index + 1} images in a row cannot be read, the last of them "
                            f"{example['id']}: {error}\nIs the storage all right? python -m train doctor tells more."
                        ) from error
                    index += 1
                    example = self.source[index % len(self.source)]
            batch["label"][row] = _label(example, self.source, self.config.train_split)
            batch["index"][row] = index % len(self.source)
        return batch


@dataclasses.dataclass(frozen=True)
class _MakeEvaluationBatch:
    """From numbers to pixels; numbers beyond the end fill up. Runs in the workers."""

    config: DataConfig
    source: Source

    def __call__(self, numbers: Sequence[int]) -> Batch:
        processor = self.config.image_processor()
        real = [number for number in numbers if number < len(self.source)]
        batch = _empty_batch(self.config, len(numbers))
        batch["mask"] = np.zeros(len(numbers), bool)
        for row, (index, example) in enumerate(zip(real, self.source.__getitems__(real))):
            batch["index"][row] = index
            batch["label"][row] = _label(example, self.source, self.config.evaluation_split)
            try:
                batch["image"][row] = processor.resize_and_crop(image_of(example))
                batch["mask"][row] = True
            except ImageError as error:
                _complain_or_go_on(self.config, example["id"], error)
                batch["bad"][row] = index
        return batch


def _empty_batch(config: DataConfig, size: int) -> Batch:
    return {
        "image": np.zeros((size, config.image_size, config.image_size, config.num_channels), np.uint8),
        "label": np.zeros(size, np.int32),
        "index": np.full(size, -1, np.int64),
        "bad": np.full(size, -1, np.int64),
    }


def _label(example: Example, source: Source, split: str) -> int:
    label, classes = example["label"], len(source.class_names)
    if not 0 <= label < classes:
        # An array on the device would take a negative one from its end.
        raise LabelError(
            f"{example['id']} in the split {split!r} has the label {label}. Expected 0 to {classes - 1}, because "
            f"the data set has {classes} classes. -1 marks splits whose labels are not published: choose another."
        )
    return label


def _complain_or_go_on(config: DataConfig, name: str, error: ImageError) -> None:
    if config.on_bad_image == "error":
        raise BadImageError(
            f"The image {name} cannot be read: {error}\nReplace it, or go on without such images: "
            "--data.on-bad-image skip (in evaluate: --on-bad-image skip) counts and reports them."
        ) from error


def _local_size(batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise InputError(
            f"A batch of {batch_size} images cannot be shared evenly by {process_count} processes. Expected a multiple "
            f"of {process_count}."
        )
    return batch_size // process_count


def _require_room(config: DataConfig, size: int, workers: int) -> None:
    """Raises ValueError where workers would be ended by their first batch."""
    if workers:
        require_room(batch_bytes(config, size), most_batches(workers, config.worker_batches))


def _shuffle_seed(seed: int) -> int:
    # Grain adds the epoch to its 32-bit seed; spread apart, the runs of two seeds do not share epochs.
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


def _spread(
    batches: grain.MapDataset[Batch], config: DataConfig, source: Source, repeat: bool
) -> grain.IterDataset[Batch]:
    """The batches made ahead of time: by workers, or by a thread of this process."""
    workers = worker_count(config, source, len(batches))
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1 if workers else config.worker_batches)
    dataset = (batches.repeat() if repeat else batches).to_iter_dataset(options)
    if workers == 0:
        return dataset
    name_as_main_of_workers()
    multiprocessing = grain.MultiprocessingOptions(workers, per_worker_buffer_size=config.worker_batches)
    return dataset.mp_prefetch(multiprocessing, worker_init_fn=_start_worker)


def _start_worker(worker: int, workers: int) -> None:
    """Leaves signals to the program, which stops its workers itself; and does not outlive it if it is killed."""
    del worker, workers
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)

    def follow_parent() -> None:
        if (parent := parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Has glibc keep the memory of one image for the next, rather than return it and ask for it again page by page.

    It keeps twice as much as the largest block that was ever freed, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD); other
    systems' allocators make nothing of it. The memory is never written to, so it costs nothing.
    """
    np.empty(31 * 2**20, np.uint8)

"""An iterator over batches that Grain makes ahead of time, by workers or by a thread of this process."""

import atexit
import functools
import gc
import logging
import weakref
from collections.abc import Iterator
from typing import Self

import grain
import numpy as np
from absl import flags
from grain.experimental import ThreadPrefetchDatasetIterator
from grain.multiprocessing import SharedMemoryArray

from poolformer_jax.errors import InputError
from poolformer_jax.images import ImageError, PoolFormerImageProcessor
from poolformer_jax.resources import available_cores, format_bytes, free_memory
from train.data.config import DataConfig
from train.data.make_batch import Batch
from train.data.sources.source import ArraySource, Source, image_of
from train.data.workers.failures import is_worker_failure, worker_error
from train.data.workers.segments import free_abandoned_segments, segment_prefix
from train.data.workers.start import initialize_worker, start_workers_without_jax

_LOG = logging.getLogger(__name__)
# The memory of a worker process without batches is at least this.
_WORKER_BYTES = 50e6


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

    Cycles of references keep some of them, and Grain frees arrays in a thread that Python does not wait for. If the
    workers are still starting, Grain does not close the iterators that read from them.
    """
    segment_prefix()  # its lock ends after `free`, because Python calls these functions in reverse order

    def free() -> None:
        for iterator in [one for one in gc.get_objects() if type(one) is ThreadPrefetchDatasetIterator]:
            iterator.close()
        pool = SharedMemoryArray._del_thread_pool
        SharedMemoryArray._disable_async_del()
        gc.collect()
        if pool is not None:
            pool.close()
            pool.join()

    atexit.register(free)


def worker_count(config: DataConfig, source: Source, batches: int | None = None) -> int:
    """The number of worker processes; 0 if a thread of this process makes the batches.

    By default one for every core but one, none for data sets in memory, and no more than there are batches.
    """
    workers = max(1, available_cores() - 1) if config.workers is None else config.workers
    if config.workers is None and isinstance(source, ArraySource):
        workers = 0  # sending a batch between processes takes longer than making it
    return workers if batches is None else min(workers, batches)


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


def batch_bytes(config: DataConfig, size: int) -> int:
    """Bytes of the pixels of `size` images."""
    return size * config.image_size**2 * config.num_channels


def check_memory(config: DataConfig, source: Source, size: int, batches: int) -> None:
    """Raises InputError if batches of `size` images do not fit into memory, before there are any.

    Counts the least that a run has at once: its workers, and the batches that they make ahead of time.
    """
    workers = worker_count(config, source, batches)
    ahead = min(max(workers, 1) * config.worker_batches, batches)
    needed = ahead * batch_bytes(config, size) + workers * _WORKER_BYTES
    if needed > (free := free_memory()):
        raise InputError(
            f"The data workers ({workers:,}) and the batches that they make ahead of time ({ahead:,} of {size:,} "
            f"images of {config.image_size} x {config.image_size} pixels) need at least {format_bytes(needed)} of "
            f"memory, and {format_bytes(free)} are free. Expected fewer --data.workers or --data.worker-batches, or a "
            "smaller --data.batch-size or --data.image-size."
        )


def max_shared_batches(workers: int, worker_batches: int) -> int:
    """The most batches that are in shared memory at a time.

    For every worker: `worker_batches` in its queue, as many that Grain has read ahead from it, and one that each side
    waits to pass on. One more is in use.
    """
    return workers * 2 * (worker_batches + 1) + 1 if workers else 0

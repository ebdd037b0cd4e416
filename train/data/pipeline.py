"""The Grain pipeline: makes batches of a source that depend on (seed, step) alone.

    example indices -> shuffled anew every epoch, without end -> paired with their global position g
    -> local batches, of which process p of P takes every P-th, starting at p -> read, decoded, transformed by workers

With balanced sampling the order of the first line is that of `balance.BalancedOrder`.

Everything before the reading is index arithmetic, so starting at a late step costs nothing. A worker makes whole
batches, and Grain returns them in the same order for any number of workers.
"""

import functools
import itertools
from collections.abc import Iterator

import grain
import numpy as np
from jaxtyping import Int

from poolformer_jax.errors import InputError
from poolformer_jax.images import PoolFormerImageProcessor
from train.data.augment.resizing import choose_resizer
from train.data.balance import BalancedOrder
from train.data.batches import Batches, check_memory
from train.data.config import DataConfig
from train.data.make_batch import MakeEvaluationBatch, MakeTrainingBatch, Place
from train.data.sources.source import Source

# Examples. Grain's own endless data set has too many for batches of one image.
_ENDLESS = 1 << 62


def train_batches(
    config: DataConfig, source: Source, *, start_step: int = 0, process_index: int = 0, process_count: int = 1
) -> Batches:
    """This process's part of the training batches, without end, starting at `start_step`.

    Every batch is {"image": uint8 [b, H, W, C], "label": int32 [b], "index": int64 [b]} with b = batch_size /
    process_count; index is the example's place in the source. For several classes per image, or regression, "label" is
    the targets, float32 [b, k]. A batch is a pure function of (config.seed, step), as the package's docstring says.

    Raises:
        ValueError: if the batch size is not a multiple of process_count, the batches do not fit into memory, or the
            resizer is not installed.
        BadImageError: from next(), for an image that cannot be read, with on_bad_image="error".
        LabelError: from next(), for a label that is not a class.
        WorkerError: from next(), if a worker process failed.
    """
    choose_resizer(config.augment.resizer)  # raises here rather than in a worker if it is not installed
    local = _local_places(config, source, start_step, process_index, process_count)
    check_memory(config, source, _local_size(config.batch_size, process_count), len(local))
    return Batches(local.map(MakeTrainingBatch(config, source)), config, source)


def train_places(
    config: DataConfig, source: Source, *, start_step: int = 0, process_index: int = 0, process_count: int = 1
) -> Iterator[Int[np.ndarray, " b"]]:
    """The places in `source` of the examples of each batch of `train_batches`."""
    local = _local_places(config, source, start_step, process_index, process_count)
    return (np.array([place.index for place in local[step]]) for step in itertools.count())


def _local_places(
    config: DataConfig, source: Source, start_step: int, process_index: int, process_count: int
) -> grain.MapDataset[list[Place]]:
    """The examples of this process's part of each training batch."""
    size = _local_size(config.batch_size, process_count)
    numbers, epochs = grain.MapDataset.range(len(source)), _ENDLESS // len(source)
    if config.sampling == "balanced":
        order = BalancedOrder(source, config.seed)
        places = numbers.repeat(epochs).map_with_index(functools.partial(_balanced_place, order))
    else:
        places = numbers.shuffle(seed=_shuffle_seed(config.seed)).repeat(epochs).map_with_index(Place)
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
        ValueError: if the batch size is not a multiple of process_count, or the batches do not fit into memory.
        BadImageError: from next(), for an image that cannot be read, with on_bad_image="error".
        LabelError: from next(), for a label that is not a class.
        WorkerError: from next(), if a worker process failed.
    """
    size = _local_size(config.evaluation_size, process_count)
    indices = grain.MapDataset.range(evaluation_steps(config, source) * config.evaluation_size).batch(
        size, batch_fn=list
    )
    local = indices[process_index::process_count]
    check_memory(config, source, size, len(local))
    image_processor = image_processor or config.image_processor()
    make_batch = MakeEvaluationBatch(config, source, image_processor)
    return Batches(local.map(make_batch), config, source, repeat, image_processor)


def evaluation_steps(config: DataConfig, source: Source) -> int:
    """The number of batches in an evaluation, the same for every process."""
    return -(-len(source) // config.evaluation_size)


def _balanced_place(order: BalancedOrder, position: int, _: int) -> Place:
    return Place(position, order(position))


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

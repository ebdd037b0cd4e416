"""Makes one batch of examples, in the workers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from poolformer_jax.errors import InputError
from poolformer_jax.images import ImageError, PoolFormerImageProcessor
from train.data.augment.transforms import TrainingTransform
from train.data.config import DataConfig
from train.data.sources.source import Example, Source, image_of

Batch = dict[str, np.ndarray]
_MAX_BAD_IN_A_ROW = 100


class BadImageError(InputError):
    """An image of the data set that cannot be read; the message names it."""


class LabelError(InputError):
    """A label that is not a class of the data set, such as the -1 of splits without labels."""


@dataclasses.dataclass(frozen=True)
class Place:
    """One training example: its global position, which keys its random numbers, and its index in the source."""

    position: int
    index: int


@dataclasses.dataclass(frozen=True)
class MakeTrainingBatch:
    """Makes a batch from places. Runs in the workers."""

    config: DataConfig
    source: Source

    def __call__(self, places: Sequence[Place]) -> Batch:
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
class MakeEvaluationBatch:
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

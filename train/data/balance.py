"""Data sets whose classes have different numbers of images: weights for the loss, and a balanced order of training.

Does not import jax.
"""

import functools

import numpy as np
from jaxtyping import Float, Int

from poolformer_jax.errors import InputError
from poolformer_jax.messages import first_few
from train.data.sources.source import Source

_SHORTEST_BLOCK = 256  # so that neighbours, which mixup mixes, are of the same class as often as by chance


def class_counts(source: Source) -> Int[np.ndarray, " classes"]:
    """The number of images of each class. Raises InputError if a label is not a class."""
    labels, classes = np.asarray(source.labels), len(source.class_names)
    if len(labels) and not (labels.min() >= 0 and labels.max() < classes):
        raise InputError(
            f"The labels go from {labels.min()} to {labels.max()}. Expected 0 to {classes - 1}, because the data set "
            f"has {classes} classes."
        )
    return np.bincount(labels, minlength=classes)


def balanced_weights(source: Source) -> Float[np.ndarray, " classes"]:
    """Weights of the loss with which every class counts the same: n / (classes * images of the class).

    As scikit-learn's `class_weight="balanced"`. Over all training images the mean weight is 1. Raises InputError,
    naming the classes without an image.
    """
    counts = class_counts(source)
    if missing := [name for name, count in zip(source.class_names, counts) if count == 0]:
        raise InputError(
            f"These classes have no training image, and so no weight: {first_few(missing)}. Expected at least one of "
            "each, or no --data.class-weights."
        )
    return counts.sum() / (len(counts) * counts)


class BalancedOrder:
    """An endless order of training in which every class is equally frequent.

    Every block of the order holds each class equally often, in random order. Each class goes through its images in a
    random order that changes with every pass. Classes without an image are left out. Position g of the order is a pure
    function of the seed and g.
    """

    def __init__(self, source: Source, seed: int) -> None:
        labels = np.asarray(source.labels)
        self._members = [np.flatnonzero(labels == label) for label in np.flatnonzero(class_counts(source))]
        self._repeats = -(-_SHORTEST_BLOCK // len(self._members))
        self._seed = seed

    def __call__(self, position: int) -> int:
        """The index in the source of the example at a position of the order."""
        classes = len(self._members)
        block, place = divmod(position, classes * self._repeats)
        turn, label = divmod(int(_permutation(classes * self._repeats, self._seed, 0, block)[place]), classes)
        members = self._members[label]
        lap, place = divmod(block * self._repeats + turn, len(members))
        return int(members[_permutation(len(members), self._seed, 1 + label, lap)[place]])


@functools.lru_cache(maxsize=4096)
def _permutation(length: int, *seed: int) -> Int[np.ndarray, " length"]:
    return np.random.default_rng(seed).permutation(length).astype(np.int32)

"""Examples by number: the splits of a data set behind one small interface.

Class folders are in `folders`, TFDS data sets in `tfds_source`; the two that need no files are here. A source goes to
every worker process, so it pickles small and opens its files where it is used.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, Protocol, TypedDict

import numpy as np
from jaxtyping import Integer, UInt8

from poolformer_jax.images.reading import ImageError
from train.data.config import DataConfig


class Example(TypedDict):
    """One image of a data set."""

    image: Any
    """The bytes of an image file, an array uint8 [h, w] or [h, w, c], or the ImageError that says why it has none."""
    label: int
    id: str
    """A name by which a person finds the image again."""


class Source(Protocol):
    """A split of a data set, with random access."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of every label, in the order of the labels."""

    @property
    def digest(self) -> str:
        """Tells these examples, in this order, from any others; the same wherever they lie."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """Several at once, which a source on slow storage reads at the same time."""


def digest_of(description: Any, *columns: np.ndarray) -> str:
    """SHA-256 of something JSON-ready and of arrays."""
    digest = hashlib.sha256(json.dumps(description).encode())
    for column in columns:
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


def image_of(example: Example) -> Any:
    """The bytes of an example's image file, or its array.

    Raises:
        ImageError: if the storage did not give the file.
    """
    if isinstance(example["image"], ImageError):
        raise example["image"]
    return example["image"]


class SourceError(ValueError):
    """A data set that cannot be opened as it was asked for, with the way to mend it."""


def open_source(config: DataConfig, split: str) -> Source:
    """The split named `split` of the data set that `config.source` names.

    Raises:
        SourceError: if there is no such data set or split, or nothing in it.
    """
    kind, _, argument = config.source.partition(":")
    # Scikit-learn and TFDS are imported only by the sources that need them: each takes seconds.
    if kind == "folder":
        from train.data.sources.folders import open_folder

        source: Source = open_folder(argument, split, config.held_out)
    elif kind == "tfds":
        from train.data.sources.tfds import open_tfds

        source = open_tfds(argument, split, config.data_dir)
    elif kind == "digits":
        source = _open_digits(split, config.held_out)
    else:
        source = synthetic_source(split, config.synthetic_examples, config.image_size, config.num_channels)
    choose = "Choose another with --data.train-split or --data.evaluation-split (in evaluate: --split), or add images"
    require_images(source, config.source, split, choose)
    return source


def require_images(source: Source, name: str, split: str, remedy: str = "Add images") -> None:
    """Makes sure that a split holds something.

    Args:
        source: the split.
        name: of the data set, as it was given.
        split: its name.
        remedy: what to do; the message goes on with why images may be missing.

    Raises:
        SourceError: if it is empty.
    """
    if len(source) == 0:
        raise SourceError(f"The split {split!r} of {name} is empty. {remedy}: of a class with one none is held out.")


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """A split that is small enough to be held in memory."""

    images: UInt8[np.ndarray, "n ..."]
    labels: Integer[np.ndarray, " n"]
    ids: tuple[str, ...]
    class_names: tuple[str, ...]

    @property
    def digest(self) -> str:
        """As `Source.digest`."""
        return digest_of([self.class_names, self.ids], self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return {"image": self.images[index], "label": int(self.labels[index]), "id": self.ids[index]}

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """Several at once."""
        return [self[index] for index in indices]


def held_out(ids: Sequence[str], labels: Sequence[int], share: float) -> np.ndarray:
    """Which examples make the evaluation split of a data set that has none: boolean [n].

    Of every class the same share, at least one and never all: those whose names have the smallest SHA-256. So the
    choice is the same on every machine, and has nothing to do with the order in which the images were taken.
    """
    chosen = np.zeros(len(ids), bool)
    # The bytes that the file system has for a name, whatever their encoding is.
    digests = np.array([hashlib.sha256(os.fsencode(name)).digest()[:8] for name in ids], dtype="S8").view(">u8")
    by_class = np.asarray(labels)
    for label in np.unique(by_class):
        members = np.flatnonzero(by_class == label)
        count = min(max(1, round(len(members) * share)), len(members) - 1)
        chosen[members[np.argsort(digests[members], kind="stable")[:count]]] = True
    return chosen


def _open_digits(split: str, share: float) -> ArraySource:
    """Scikit-learn's handwritten digits: 1797 scans of 8 x 8 pixels in 17 levels of grey, here spread over 0 to 255."""
    from sklearn.datasets import load_digits

    _require_split("digits", split)
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    ids = [f"digits/{index:04d}" for index in range(len(labels))]
    rows = np.flatnonzero(held_out(ids, labels.tolist(), share) == (split == "validation"))
    return ArraySource(images[rows], labels[rows], tuple(ids[row] for row in rows), tuple("0123456789"))


def synthetic_source(split: str, examples: int, image_size: int, num_channels: int) -> ArraySource:
    """Images made up on the spot that a network can learn: ten directions of a grating, under noise.

    The two splits share the classes and no image.
    """
    _require_split("synthetic", split)
    rng = np.random.default_rng([split == "validation", examples, image_size, num_channels])
    classes = 10
    labels = np.arange(examples) % classes
    angle = labels * np.pi / classes + rng.normal(0, 0.03, examples)
    phase = rng.uniform(0, 2 * np.pi, examples)
    waves = 4.0  # across the image, so that the direction survives any size
    position = np.linspace(-np.pi, np.pi, image_size, endpoint=False) * waves
    images = np.empty((examples, image_size, image_size, num_channels), np.uint8)
    for index in range(examples):
        wave = np.cos(angle[index]) * position[:, None] + np.sin(angle[index]) * position + phase[index]
        noise = rng.normal(0, 25, (image_size, image_size, num_channels))
        images[index] = np.clip(128 + 70 * np.sin(wave)[..., None] + noise, 0, 255)
    ids = tuple(f"synthetic/{split}/{index:06d}" for index in range(examples))
    return ArraySource(images, labels, ids, tuple(f"{18 * number} degrees" for number in range(classes)))


def _require_split(name: str, split: str) -> None:
    if split not in ("train", "validation"):
        raise SourceError(f"The data set {name} has no split {split!r}. Expected train or validation.")

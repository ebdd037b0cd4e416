"""What a data source is: examples by index, with random access, and the parts that every kind of source shares.

A source is sent to every worker process, so it pickles small and opens its files where it is used.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, Protocol, TypedDict

import numpy as np
from jaxtyping import Integer, UInt8

from poolformer_jax.errors import InputError
from poolformer_jax.images.reading import ImageError


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


class SourceError(InputError):
    """A data set that cannot be opened as it was asked for, with the way to mend it."""


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

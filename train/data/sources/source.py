"""The protocol of a data source, examples by index, and what the sources share.

Every worker process gets a pickled copy of the source, so a source is small and opens its files when they are read.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self, TypedDict

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image

from poolformer_jax.errors import InputError, PoolFormerError
from poolformer_jax.images import ImageError, read_image
from poolformer_jax.messages import first_few

SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "test": "test",
}
"""The names of files and columns' values, and the splits that they mean."""
_LIKE_SPLITS = (*SPLIT_NAMES, "training", "testing", "dev", "eval")


class Example(TypedDict):
    """One image of a data set."""

    image: Any
    """The bytes of an image file, an array uint8 [h, w] or [h, w, c], or the ImageError of an unreadable file."""
    label: Any
    """The number of its class, or its targets, float32 [k]."""
    id: str
    """A name by which a user finds the image, such as its path."""


class Source(Protocol):
    """A split of a data set, with random access."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of every label, in the order of the labels."""

    @property
    def labels(self) -> np.ndarray:
        """The label of every example: int [n]. For data sets whose labels are stored with the images this is slow."""

    @property
    def digest(self) -> str:
        """A hash of the examples and their order, which does not depend on where they are stored."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """Several examples, which a source may read concurrently."""


class LabelledSource:
    """What the sources share whose labels are an array: frozen dataclasses with these two fields."""

    class_names: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def relabel(self, class_names: tuple[str, ...], new_labels: np.ndarray) -> Self:
        """The source with other classes; `new_labels`, int32 [classes], holds the new label of each label."""
        source: Any = self
        return dataclasses.replace(source, class_names=class_names, labels=new_labels[self.labels])

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """See `Source.__getitems__`."""
        source: Any = self
        return [source[index] for index in indices]


def digest_of(description: Any, *columns: np.ndarray) -> str:
    """SHA-256 of a JSON-ready value and of arrays."""
    digest = hashlib.sha256(json.dumps(description).encode())
    for column in columns:
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


def label_at(labels: np.ndarray, index: int) -> Any:
    """The label of an example: an int, or its targets float32 [k] if `labels` is [n, k]."""
    return int(labels[index]) if labels.ndim == 1 else labels[index]


def is_misnamed_split(name: str) -> bool:
    """True for names that look like a split's but are not read as one: Validation, dev."""
    return name not in SPLIT_NAMES and name.lower() in _LIKE_SPLITS


def require_split(data: str, split: str, splits: Collection[str]) -> None:
    """Raises SourceError if `data`, divided into `splits`, has no `split` and cannot draw it from train.

    `splits` is [""] if the data is not divided. Beside a split with another name validation is not drawn from train,
    because that split may be meant.
    """
    unknown = set(splits) - set(SPLIT_NAMES.values())
    is_drawn = "" in splits or ("train" in splits and (split == "train" or not unknown))
    if split not in ("train", "validation") or not is_drawn:
        found = first_few([name for name in splits if name]) or "train, validation"
        raise SourceError(
            f"{data} has no split {split!r}. It has: {found}. Expected names among {', '.join(SPLIT_NAMES)}; or choose "
            "others with --data.train-split and --data.evaluation-split (in evaluate: --split)."
        )


def image_of(example: Example) -> Any:
    """The bytes of an example's image file, or its array. Raises ImageError if the file could not be read."""
    if isinstance(example["image"], ImageError):
        raise example["image"]
    return example["image"]


def read_example(example: Example) -> Image.Image:
    """An example's picture, whole and upright; grey images stay grey. Raises ImageError if it cannot be read."""
    image = image_of(example)
    if isinstance(image, bytes):
        return read_image(image)
    pixels = np.asarray(image)
    return read_image(pixels, 1 if pixels.ndim == 2 or pixels.shape[2] == 1 else 3, "channels_last")


class SourceError(InputError):
    """A data set that cannot be opened."""


@contextmanager
def raising_source_errors(what: str) -> Iterator[None]:
    """Turns what another library raises for damaged files, which no common class shows, into a SourceError.

    `what` begins its message. Errors of this project and MemoryError pass.
    """
    try:
        yield
    except (PoolFormerError, MemoryError):
        raise
    except Exception as error:
        raise SourceError(f"{what}: {error}") from error


def resolved(path: str | Path) -> Path:
    """The absolute path with links followed. On a loop of links it ends there, where `Path.resolve` raises an error."""
    return Path(os.path.realpath(Path(path).expanduser()))


def check_not_empty(source: Source, name: str, split: str, remedy: str = "Add images") -> None:
    """Raises SourceError, with the names of the data set and the split, if a split has no examples."""
    if len(source) == 0:
        raise SourceError(
            f"The split {split!r} of {name} is empty. {remedy}: nothing is held out of a class with a single image."
        )


@dataclasses.dataclass(frozen=True)
class ArraySource(LabelledSource):
    """A split in memory."""

    images: UInt8[np.ndarray, "n ..."]
    labels: Integer[np.ndarray, " n"]
    ids: tuple[str, ...]
    class_names: tuple[str, ...]

    @property
    def digest(self) -> str:
        """See `Source.digest`."""
        return digest_of([self.class_names, self.ids], self.labels)

    def __getitem__(self, index: int) -> Example:
        return {"image": self.images[index], "label": int(self.labels[index]), "id": self.ids[index]}


def drawn_rows(split: str, ids: Sequence[str] | Sequence[bytes], labels: np.ndarray, share: float) -> np.ndarray:
    """The rows of the split "train" or "validation" of a data set that is not divided into them."""
    return np.flatnonzero(held_out(ids, labels, share) == (split == "validation"))


def held_out(ids: Sequence[str] | Sequence[bytes], labels: np.ndarray, share: float) -> np.ndarray:
    """True for the examples in the evaluation split of a data set that has none: bool [n].

    Takes the same share of every class, at least one example and never all: those whose ids have the smallest SHA-256.
    The choice is then the same on every machine and independent of the order in which the images were taken. Of targets
    [n, k] the share is taken regardless of them.
    """
    chosen = np.zeros(len(ids), bool)
    # Hash the file system's bytes, so that the choice does not depend on an encoding.
    digests = np.array([hashlib.sha256(os.fsencode(name)).digest()[:8] for name in ids], dtype="S8").view(">u8")
    by_class = labels if labels.ndim == 1 else np.zeros(len(ids))
    for label in np.unique(by_class):
        members = np.flatnonzero(by_class == label)
        count = min(max(1, round(len(members) * share)), len(members) - 1)
        chosen[members[np.argsort(digests[members], kind="stable")[:count]]] = True
    return chosen

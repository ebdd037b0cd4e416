"""Class folders, as torchvision and timm users have them: one folder per class, the images anywhere below it.

    PATH/train/tench/1.jpg  PATH/validation/tench/9.jpg        two splits
    PATH/tench/1.jpg                                           one pool; a share of every class is held out

A pool as a whole is its split "train+validation", in TFDS's notation.
Labels follow the sorted names of the class folders. A file whose name does not end as an image's that Pillow reads is
passed over and counted.
"""

import dataclasses
import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from poolformer_jax.fields import first_few
from poolformer_jax.images.reading import ImageError, image_suffixes, printable
from train.data.sources.source import Example, SourceError, digest_of, held_out

WHOLE = "train+validation"
_ALIASES = {"validation": ("validation", "val", "valid")}
_SPLITS = ("train", *_ALIASES["validation"], "test")
# What splits are called elsewhere, in any case.
_LIKE_SPLITS = frozenset({*_SPLITS, "training", "testing"})
_READING_THREADS = 16
_WORTH_A_THREAD = 50e-6  # seconds: a file in memory takes less, and handing it to a thread as much


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Image files and their labels. Names are kept as one array: a million of them pickle in no time."""

    root: Path
    names: np.ndarray
    """File names relative to root, as the bytes the file system uses: [n], dtype S."""
    labels: np.ndarray
    """int32 [n]."""
    class_names: tuple[str, ...]
    passed_over: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """How many other files the class folders hold, by the ending of their names."""

    @property
    def digest(self) -> str:
        """As `Source.digest`."""
        return digest_of(self.class_names, self.names, self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        path = self._path(index)
        try:
            image: bytes | ImageError = Path(path).read_bytes()
        except OSError as error:
            self._require_root(error)
            image = ImageError(f"its file cannot be read: {error.strerror or error}")
        return {"image": image, "label": int(self.labels[index]), "id": printable(path)}

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """Several at once, read by threads where that pays."""
        examples = []
        for number, index in enumerate(indices):
            start = time.perf_counter()
            examples.append(self[index])
            if time.perf_counter() - start > _WORTH_A_THREAD:
                return examples + list(_readers().map(self.__getitem__, indices[number + 1 :]))
        return examples

    def _require_root(self, error: OSError) -> None:
        """One file that cannot be read is a bad image; a folder that went away, or was unmounted, is not."""
        if not self.root.is_dir() or not any(self.root.iterdir()):
            raise SourceError(
                f"The folder {self.root} is gone, or empty by now. Expected it to stay: mount it again, and run the "
                "same command to go on."
            ) from error

    def size_of(self, index: int) -> int:
        """Bytes of the file; 0 if it is not there."""
        try:
            return os.stat(self._path(index)).st_size  # noqa: PTH116 - a million times
        except OSError:
            return 0

    def _path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(bytes(self.names[index])))  # noqa: PTH118 - a million times

    def select(self, rows: np.ndarray) -> "FolderSource":
        """The source of only these examples."""
        return dataclasses.replace(self, names=self.names[rows], labels=self.labels[rows])


_Listing = Callable[[Path, tuple[str, ...] | None], FolderSource]


@functools.cache
def _readers() -> ThreadPoolExecutor:
    """One set of threads for the life of a process."""
    return ThreadPoolExecutor(_READING_THREADS, thread_name_prefix="image-reader")


def open_folder(
    path: str | Path, split: str, held_out_share: float, list_images: _Listing | None = None
) -> FolderSource:
    """The split named `split` of the class folders below `path`.

    Args:
        path: the folder that holds a folder per class, or per split.
        split: its name.
        held_out_share: of every class, for validation, where it has no folder of its own.
        list_images: in the place of `read_class_folders`, with the first two of its arguments.

    Raises:
        SourceError: if the folder has no such split, no class, classes that training does not know, or splits beside
            classes.
    """
    list_images = read_class_folders if list_images is None else list_images
    root = Path(path).expanduser().resolve()
    if not root.is_dir():
        raise SourceError(f"folder:{path}: there is no folder {root}.")
    own_train, own_split = _split_folder(root, "train"), _split_folder(root, split)
    own_validation = _split_folder(root, "validation")
    if own_train is None and own_validation is None:
        _refuse_splits_as_classes(path, root)
    if split == WHOLE and is_pool(root):
        return list_images(root, None)
    _refuse_splits_beside_classes(path, root, own_train or own_validation)
    if own_split is None and split not in ("train", "validation"):
        found = ", ".join(entry.name for entry in _folders(root)) or "no folder at all"
        raise SourceError(f"folder:{path} has no split {split!r}: {root} holds {found}.")
    if own_split is not None and split != "train":
        classes = _class_names(own_train) if own_train is not None else None
        return list_images(own_split, classes)
    if own_train is None and own_validation is not None:
        raise SourceError(f"folder:{path} has {own_validation.name}/ but no train/. Expected both, or class folders.")
    pool = list_images(own_train or root, None)
    if own_validation is not None:
        return pool
    ids = [os.fsdecode(bytes(name)) for name in pool.names]
    chosen = held_out(ids, pool.labels.tolist(), held_out_share)
    return pool.select(np.flatnonzero(chosen == (split == "validation")))


def is_pool(path: str | Path) -> bool:
    """Whether `path` is a folder whose images nobody has divided into splits."""
    root = Path(path).expanduser()
    return root.is_dir() and not any(_split_folder(root, split) for split in ("train", "validation"))


def describe_split(path: str | Path, split: str, held_out_share: float) -> str:
    """What `open_folder` makes of the split, in words."""
    root = Path(path).expanduser()
    if split == WHOLE and is_pool(root):
        return "all images of its class folders"
    if split == "validation" and _split_folder(root, split) is None:
        return f"split {split} ({100 * held_out_share:g} % of every class, which training holds out)"
    if split == "train" and _split_folder(root, "validation") is None:
        return f"split {split} (without the {100 * held_out_share:g} % of every class that training holds out)"
    return f"split {split}"


def read_class_folders(
    root: Path, class_names: tuple[str, ...] | None = None, on_count: Callable[[int], None] = lambda count: None
) -> FolderSource:
    """Every image below the class folders of `root`, in the order of their names.

    Args:
        root: the folder that holds one folder per class.
        class_names: the labels' names where another split decides them. Default: the folders here.
        on_count: called with the number of images found so far, after every class.

    Raises:
        SourceError: naming every class without an image, or unknown to `class_names`.
    """
    found = _class_names(root)
    if not found:
        raise SourceError(f"{root} holds no folder. Expected one per class, with images in it.")
    names_of = found if class_names is None else class_names
    if unknown := [name for name in found if name not in set(names_of)]:
        raise SourceError(f"{root} has classes that training does not: {', '.join(unknown)}. Rename or remove them.")
    label_of = {name: label for label, name in enumerate(names_of)}
    files: list[bytes] = []
    labels: list[int] = []
    empty = []
    passed_over: Counter[str] = Counter()
    for name in found:
        below = sorted(os.fsencode(file) for file in _images_below(root / name, name, image_suffixes(), passed_over))
        files += below
        labels += [label_of[name]] * len(below)
        on_count(len(files))
        if not below:
            empty.append(name)
    if empty and class_names is None:
        kinds = ", ".join(sorted(image_suffixes()))
        raise SourceError(f"{root}: no image in {', '.join(empty)}. Expected files that end in one of {kinds}.")
    names = np.array(files, dtype=np.bytes_)
    shown = tuple(printable(name) for name in names_of)
    return FolderSource(
        root,
        names,
        np.array(labels, np.int32),
        shown,
        {printable(suffix): count for suffix, count in passed_over.items()},
    )


def _split_folder(root: Path, split: str) -> Path | None:
    return next((root / name for name in _ALIASES.get(split, (split,)) if (root / name).is_dir()), None)


def _refuse_splits_beside_classes(path: str | Path, root: Path, split: Path | None) -> None:
    """Raises SourceError if `split` may be the folder of a class, with those of the others beside it."""
    if split is None:
        return
    classes = set(_class_names(split))
    beside = [name for name in _class_names(root) if name not in _SPLITS]
    if others := first_few([name for name in beside if _looks_like_a_class(root / name, classes)]):
        raise SourceError(
            f"folder:{path} can be read in two ways: {split.name}/ is a split, and {others} beside it would be passed "
            f"over; or all of them are classes. Expected splits alone ({', '.join(_SPLITS)}), or classes alone. If "
            f"{split.name}/ is a split, move {others} out of {root}; if it is a class, move all of them into a folder "
            "PATH/train and give folder:PATH, or call it something else."
        )


def _refuse_splits_as_classes(path: str | Path, root: Path) -> None:
    """Raises SourceError if splits of other names would be learnt as classes. One such name may be that of a class."""
    if len(like_splits := [name for name in _class_names(root) if name.lower() in _LIKE_SPLITS]) > 1:
        raise SourceError(
            f"folder:{path}: {first_few(like_splits)} would be taken for classes, and look like splits. Expected "
            f"splits with names of {', '.join(_SPLITS)}, in small letters, and one folder per class in each; or, if "
            "they are classes, all classes in a folder PATH/train, given as folder:PATH."
        )


def _looks_like_a_class(folder: Path, classes: set[str]) -> bool:
    """Whether a folder beside a split of `classes` holds images, and is itself neither a split of them nor a run's.

    The pictures that a run leaves would otherwise keep it from going on.
    """
    try:
        below = set(_class_names(folder))
        if below and below <= classes:
            return False
        first = next(_images_below(folder, "", image_suffixes(), Counter()), None)
        return first is not None and next(folder.rglob("recipe.json"), None) is None
    except OSError:  # what nobody may look into, as a disk's lost+found, is no class
        return False


def _folders(root: Path) -> list[os.DirEntry[str]]:
    with os.scandir(root) as entries:
        return sorted((e for e in entries if e.is_dir() and not e.name.startswith(".")), key=lambda entry: entry.name)


def _class_names(root: Path) -> tuple[str, ...]:
    return tuple(entry.name for entry in _folders(root))


def _images_below(folder: Path, prefix: str, suffixes: frozenset[str], passed_over: Counter[str]) -> Iterator[str]:
    """Names of image files, relative to the parent of the class folder; counts the others by their endings."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = f"{prefix}/{entry.name}"
            if entry.is_dir():
                yield from _images_below(folder / entry.name, name, suffixes, passed_over)
                continue
            suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122 - a million times
            if suffix in suffixes:
                yield name
            else:
                passed_over[suffix] += 1

"""Class folders, as in torchvision and timm: one folder per class, with the images anywhere below it.

    PATH/train/tench/1.jpg  PATH/validation/tench/9.jpg        two splits
    PATH/tench/1.jpg                                           one pool; a share of every class is held out

The split "train+validation" (TFDS's notation) is a pool as a whole. Labels follow the sorted names of the class
folders. Files without the ending of an image format that Pillow reads are skipped and counted.
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
from poolformer_jax.images import ImageError, image_suffixes, printable
from train.data.sources.source import Example, SourceError, digest_of, held_out

ALL_IMAGES = "train+validation"
_ALIASES = {"validation": ("validation", "val", "valid")}
_SPLITS = ("train", *_ALIASES["validation"], "test")
_READING_THREADS = 16
_SLOW_READ = 50e-6  # seconds: a cached file takes less, and so does passing it to a thread


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Image files and their labels. The names are one array, because a million of them then pickle at once."""

    root: Path
    names: np.ndarray
    """File names relative to root, as the file system's bytes: [n], dtype S."""
    labels: np.ndarray
    """int32 [n]."""
    class_names: tuple[str, ...]
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """The number of other files in the class folders, by the ending of their names."""

    @property
    def digest(self) -> str:
        """See `Source.digest`."""
        return digest_of(self.class_names, self.names, self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        path = self._path(index)
        try:
            image: bytes | ImageError = Path(path).read_bytes()
        except OSError as error:
            self._check_root(error)
            image = ImageError(f"its file cannot be read: {error.strerror or error}")
        return {"image": image, "label": int(self.labels[index]), "id": printable(path)}

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """Several examples; threads read the rest of them after the first slow read."""
        examples = []
        for number, index in enumerate(indices):
            start = time.perf_counter()
            examples.append(self[index])
            if time.perf_counter() - start > _SLOW_READ:
                return examples + list(_readers().map(self.__getitem__, indices[number + 1 :]))
        return examples

    def _check_root(self, error: OSError) -> None:
        """A single unreadable file is a bad image; a folder that was removed or unmounted is an error."""
        if not self.root.is_dir() or not any(self.root.iterdir()):
            raise SourceError(
                f"The folder {self.root} no longer exists or is empty. Mount it again, and run the same command to "
                "continue."
            ) from error

    def size_of(self, index: int) -> int:
        """Bytes of the file; 0 if it does not exist."""
        try:
            return os.stat(self._path(index)).st_size  # noqa: PTH116 - a million times
        except OSError:
            return 0

    def _path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(bytes(self.names[index])))  # noqa: PTH118 - a million times

    def select(self, rows: np.ndarray) -> "FolderSource":
        """The source with only the examples `rows`."""
        return dataclasses.replace(self, names=self.names[rows], labels=self.labels[rows])


ListImages = Callable[[Path, tuple[str, ...] | None], FolderSource]
"""Called as `read_class_folders(root, class_names)`."""


@functools.cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_READING_THREADS, thread_name_prefix="image-reader")


def open_folder(
    path: str | Path, split: str, held_out_share: float, list_images: ListImages | None = None
) -> FolderSource:
    """The split named `split` of the class folders below `path`.

    Args:
        path: the folder that holds a folder per class, or per split.
        split: its name.
        held_out_share: share of every class for validation, if that has no folder.
        list_images: replaces `read_class_folders`.

    Raises:
        SourceError: if the folder has no such split, no class, classes that training does not have, or classes beside
            splits.
    """
    list_images = list_images or read_class_folders
    root = Path(path).expanduser().resolve()
    if not root.is_dir():
        raise SourceError(f"folder:{path}: there is no folder {root}.")
    train, validation, folder = (_split_folder(root, name) for name in ("train", "validation", split))
    _check_layout(path, root, train or validation)
    if split == ALL_IMAGES and is_pool(root):
        return list_images(root, None)
    if folder is None and split not in ("train", "validation"):
        found = ", ".join(_class_names(root)) or "no folder"
        raise SourceError(f"folder:{path} has no split {split!r}: {root} holds {found}.")
    if folder is not None and split != "train":
        return list_images(folder, None if train is None else _class_names(train))
    if train is None and validation is not None:
        raise SourceError(f"folder:{path} has {validation.name}/ but no train/. Expected both, or class folders.")
    pool = list_images(train or root, None)
    if validation is not None:
        return pool
    names = [os.fsdecode(bytes(name)) for name in pool.names]
    chosen = held_out(names, pool.labels.tolist(), held_out_share)
    return pool.select(np.flatnonzero(chosen == (split == "validation")))


def is_pool(path: str | Path) -> bool:
    """True if `path` is a folder of classes that are not divided into splits."""
    root = Path(path).expanduser()
    return root.is_dir() and not any(_split_folder(root, split) for split in ("train", "validation"))


def describe_split(path: str | Path, split: str, held_out_share: float) -> str:
    """The split that `open_folder` reads, in words."""
    root = Path(path).expanduser()
    if split == ALL_IMAGES and is_pool(root):
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
        class_names: the classes of the training split, for another split. Default: the folders of `root`.
        on_count: called with the number of images found so far, after every class.

    Raises:
        SourceError: with every class that has no image, or that is not in `class_names`.
    """
    found = _class_names(root)
    if not found:
        raise SourceError(f"{root} holds no folder. Expected one per class, with images in it.")
    names_of = found if class_names is None else class_names
    if unknown := [name for name in found if name not in set(names_of)]:
        raise SourceError(
            f"{root} has classes that training does not have: {', '.join(unknown)}. Rename or remove them."
        )
    label_of = {name: label for label, name in enumerate(names_of)}
    files: list[bytes] = []
    labels: list[int] = []
    empty = []
    skipped: Counter[str] = Counter()
    for name in found:
        below = sorted(os.fsencode(file) for file in _images_below(root / name, name, image_suffixes(), skipped))
        files += below
        labels += [label_of[name]] * len(below)
        on_count(len(files))
        if not below:
            empty.append(name)
    if empty and class_names is None:
        kinds = ", ".join(sorted(image_suffixes()))
        raise SourceError(f"{root}: no image in {', '.join(empty)}. Expected files that end in one of {kinds}.")
    return FolderSource(
        root,
        np.array(files, dtype=np.bytes_),
        np.array(labels, np.int32),
        tuple(map(printable, names_of)),
        {printable(suffix): count for suffix, count in skipped.items()},
    )


def _split_folder(root: Path, split: str) -> Path | None:
    return next((root / name for name in _ALIASES.get(split, (split,)) if (root / name).is_dir()), None)


def _check_layout(path: str | Path, root: Path, split: Path | None) -> None:
    """Raises SourceError if splits would be learnt as classes, or if classes beside the folder `split` would be lost.

    Only folders with images directly in them count as classes: other splits and the folders of runs have none.
    """
    names = _class_names(root)
    if split is None:
        like_splits = [name for name in names if name.lower() in (*_SPLITS, "training", "testing")]
        if len(like_splits) > 1:  # a single one may be the name of a class
            raise SourceError(
                f"folder:{path}: {first_few(like_splits)} look like splits but would be read as classes. Expected "
                f"splits named {', '.join(_SPLITS)}, in lower case, with one folder per class in each; or, if they are "
                "classes, all classes in a folder PATH/train, given as folder:PATH."
            )
    elif classes := first_few([name for name in names if name not in _SPLITS and _holds_images(root / name)]):
        raise SourceError(
            f"folder:{path} is ambiguous: {split.name}/ is read as a split, so that {classes} beside it would be "
            f"ignored; but all of them may be classes. If {split.name}/ is a split, move {classes} out of {root}; if "
            "it is a class, move all of them into a folder PATH/train and give folder:PATH, or rename it."
        )


def _holds_images(folder: Path) -> bool:
    """True if images lie directly in a folder."""
    try:
        return any(path.suffix.lower() in image_suffixes() for path in folder.iterdir())
    except OSError:  # such as lost+found, which only root may read
        return False


def _folders(root: Path) -> list[os.DirEntry[str]]:
    with os.scandir(root) as entries:
        return sorted((e for e in entries if e.is_dir() and not e.name.startswith(".")), key=lambda entry: entry.name)


def _class_names(root: Path) -> tuple[str, ...]:
    return tuple(entry.name for entry in _folders(root))


def _images_below(folder: Path, prefix: str, suffixes: frozenset[str], skipped: Counter[str]) -> Iterator[str]:
    """Names of image files, starting with `prefix`; counts other files in `skipped` by their endings."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = f"{prefix}/{entry.name}"
            if entry.is_dir():
                yield from _images_below(folder / entry.name, name, suffixes, skipped)
                continue
            suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122 - a million times
            if suffix in suffixes:
                yield name
            else:
                skipped[suffix] += 1

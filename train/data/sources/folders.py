"""Class folders, as in torchvision and timm: one folder per class, with the images anywhere below it.

    PATH/train/tench/1.jpg  PATH/validation/tench/9.jpg        two splits
    PATH/tench/1.jpg                                           one pool; a share of every class is held out

The split "train+validation" (TFDS's notation) is a pool as a whole. Labels follow the names of the class folders in
timm's natural order, in which numbers count as numbers: 2 comes before 10.

Only files that end like an image format that Pillow reads are images. Other files, hidden files and folders, the
folders that storage systems and file managers add (such as a NAS's thumbnails in @eaDir), and links back to a folder
above are passed over and counted.
"""

import dataclasses
import functools
import os
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from poolformer_jax.images import HEIF_SUFFIXES, ImageError, image_suffixes, read_image_file
from poolformer_jax.messages import MAX_MESSAGE, first_few, printable
from train.data.sources.source import (
    Example,
    LabelledSource,
    Source,
    SourceError,
    digest_of,
    drawn_rows,
    is_misnamed_split,
    label_at,
    resolved,
)

ALL_IMAGES = "train+validation"
_ALIASES = {"validation": ("validation", "val", "valid")}
_SPLITS = ("train", *_ALIASES["validation"], "test")
# Folders that a NAS, a file manager, an archive or a file system adds. They hold thumbnails, copies or nothing.
_SYSTEM_FOLDERS = {
    "@eaDir",
    "@Recycle",
    "#recycle",
    "#snapshot",
    "__MACOSX",
    "lost+found",
    "$RECYCLE.BIN",
    "System Volume Information",
}
_HIDDEN, _READ_BEFORE = "hidden", "links to a folder that is read already"
_HEIF_HINT = "HEIC photos can be read if pillow-heif is installed, the extra heif"
_READING_THREADS = 16
_SLOW_READ = 50e-6  # seconds: a cached file takes less, and so does passing it to a thread


@dataclasses.dataclass(frozen=True)
class FolderSource(LabelledSource):
    """Image files and their labels. The names are one array, because a million of them then pickle at once."""

    root: Path
    names: np.ndarray
    """File names relative to root, as the file system's bytes: [n], dtype S."""
    labels: np.ndarray
    """int32 [n], or the targets of each image, float32 [n, k]."""
    class_names: tuple[str, ...]
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """The number of files and folders in the class folders that were passed over, by ending or kind."""

    @property
    def digest(self) -> str:
        """See `Source.digest`."""
        return digest_of(self.class_names, self.names, self.labels)

    def __getitem__(self, index: int) -> Example:
        path = self._path(index)
        try:
            image: bytes | ImageError = read_image_file(path)
        except ImageError as error:
            image = error
        except OSError as error:
            self._check_root(error)
            image = ImageError(f"its file cannot be read: {error.strerror or error}")
        return {"image": image, "label": label_at(self.labels, index), "id": printable(path, MAX_MESSAGE)}

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
            return os.stat(self._path(index)).st_size  # noqa: PTH116 - called a million times
        except OSError:
            return 0

    def _path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(bytes(self.names[index])))  # noqa: PTH118 - called a million times

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

    `held_out_share` is the share of every class for validation, if that has no folder. Raises SourceError if the folder
    has no such split, no class, classes that training does not have, or classes beside splits.
    """
    list_images = list_images or read_class_folders
    root = resolved(path)
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
    return pool.select(drawn_rows(split, pool.names.tolist(), pool.labels, held_out_share))


def is_pool(path: str | Path) -> bool:
    """True if `path` is a folder of classes that are not divided into splits."""
    root = Path(path).expanduser()
    return root.is_dir() and not any(_split_folder(root, split) for split in ("train", "validation"))


def folder_splits(path: str | Path) -> tuple[str, ...]:
    """The splits among train, validation and test that a folder is divided into; none if it has classes."""
    root = Path(path).expanduser()
    return () if is_pool(root) else tuple(name for name in ("train", "validation", "test") if _split_folder(root, name))


def natural_key(name: str) -> tuple[list[str | int], str]:
    """The key that sorts names by the numbers in them, and otherwise regardless of case.

    Source: timm, data/readers/reader_image_folder.py and utils/misc.py (natural_key).
    """
    parts = re.split(r"(\d+)", name.lower())  # every second part is a number
    # Python refuses numbers of more than 4,300 digits.
    return [int(part[:4_000]) if place % 2 else part for place, part in enumerate(parts)], name


def describe_skipped(source: Source) -> str:
    """What the class folders hold besides images, by the most frequent kinds; "" for nothing."""
    if not isinstance(source, FolderSource) or not source.skipped:
        return ""
    counts = sorted(source.skipped.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{count:,} {kind or 'without a suffix'}" for kind, count in counts[:5])
    total = sum(source.skipped.values())
    hint = f" ({_HEIF_HINT})" if source.skipped.keys() & HEIF_SUFFIXES else ""
    return f"passed over {total:,} other {'file' if total == 1 else 'files'}: {listed}{hint}"


def read_class_folders(
    root: Path, class_names: tuple[str, ...] | None = None, on_count: Callable[[int], None] = lambda count: None
) -> FolderSource:
    """Every image below the class folders of `root`, in the natural order of the classes.

    `class_names` are those of the training split, for another split. `on_count` is called with the number of images
    found so far, after every class. Raises SourceError with every class that has no image, or that is not in
    `class_names`.
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
        below = sorted(os.fsencode(file) for file in _images_below(root, name, skipped))
        files += below
        labels += [label_of[name]] * len(below)
        on_count(len(files))
        if not below:
            empty.append(name)
    if empty and class_names is None:
        hint = f" {_HEIF_HINT}." if skipped.keys() & HEIF_SUFFIXES else ""
        raise SourceError(
            f"{root}: no image in {', '.join(empty)}. Expected files that end in .jpg, .png or one of "
            f"{len(image_suffixes()) - 2} others: add images or delete the folder.{hint}"
        )
    return FolderSource(
        root,
        np.array(files, dtype=np.bytes_),
        np.array(labels, np.int32),
        tuple(printable(name, MAX_MESSAGE) for name in names_of),
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
        like_splits = [name for name in names if name in _SPLITS or is_misnamed_split(name)]
        if len(like_splits) > 1:  # a single one may be the name of a class
            raise SourceError(
                f"folder:{path}: {first_few(like_splits)} look like splits but would be read as classes. Expected "
                f"splits named {', '.join(_SPLITS)}, in lower case, with one folder per class in each; or, if they are "
                "classes, all classes in a folder PATH/train, given as folder:PATH."
            )
        return
    odd = [name for name in names if is_misnamed_split(name)]
    if odd and _split_folder(root, "validation") is None:
        raise SourceError(
            f"folder:{path}: {first_few(odd)} beside {split.name}/ would not be read. Expected splits named "
            f"{', '.join(_SPLITS)}, in lower case."
        )
    if classes := first_few([name for name in names if name not in _SPLITS and _holds_images(root / name)]):
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


def _class_names(root: Path) -> tuple[str, ...]:
    with os.scandir(root) as entries:
        names = [entry.name for entry in entries if _is_folder(entry) and not _is_system_folder(entry.name)]
    return tuple(sorted(names, key=natural_key))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a symbolic link to itself
        return False


def _is_system_folder(name: str) -> bool:
    return name.startswith(".") or name in _SYSTEM_FOLDERS


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _images_below(root: Path, class_name: str, skipped: Counter[str]) -> Iterator[str]:
    """Names of image files, starting with `class_name`; counts everything else in `skipped`.

    Reads each folder once, by device and inode, and links last: links may form a loop, or lead to one folder by a
    million paths.
    """
    pending, seen = deque([class_name]), {_identity(root)}
    while pending:
        folder = pending.popleft()
        if (identity := _identity(root / folder)) in seen:
            skipped[_READ_BEFORE] += 1
            continue
        seen.add(identity)
        links = []
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    skipped[_HIDDEN] += 1
                    continue
                name = f"{folder}/{entry.name}"
                if _is_folder(entry):
                    if entry.name in _SYSTEM_FOLDERS:
                        skipped[f"{entry.name}/"] += 1
                    elif entry.is_symlink():
                        links.append(name)
                    else:
                        pending.appendleft(name)
                    continue
                suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122 - called a million times
                if suffix in image_suffixes():
                    yield name
                else:
                    skipped[suffix] += 1
        pending.extend(sorted(links))

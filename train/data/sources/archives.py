"""ImageNet as it is distributed: three archives, which are read without unpacking them.

    ILSVRC2012_img_train.tar        a tar of 1000 tars, n01440764.tar and so on, one per class
    ILSVRC2012_img_val.tar          50000 images; their classes are in the development kit
    ILSVRC2012_devkit_t12.tar.gz    data/meta.mat (classes), data/ILSVRC2012_validation_ground_truth.txt

A class's label is the place of its WordNet id in sorted order, as in every published model.
"""

import dataclasses
import io
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from poolformer_jax.files import check_file
from poolformer_jax.messages import MAX_MESSAGE, printable
from train.data.sources.source import Example, LabelledSource, SourceError, digest_of

TRAIN, VALIDATION, KIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
_LONGEST_NAME = 255  # characters; in memory every name takes the space of the longest one
_LARGEST_KIT = 1 << 24  # bytes of the development kit, and of a file in it; it has 2.5 MB


@dataclasses.dataclass(frozen=True)
class ArchiveSource(LabelledSource):
    """Images inside an uncompressed tar archive, found by their offsets and sizes."""

    archive: Path
    names: np.ndarray
    """[n], dtype S."""
    offsets: np.ndarray
    """int64 [n], in bytes from the beginning of the archive."""
    sizes: np.ndarray
    """int64 [n], in bytes."""
    labels: np.ndarray
    """int32 [n]."""
    class_names: tuple[str, ...]

    @property
    def digest(self) -> str:
        """See `Source.digest`."""
        return digest_of(self.class_names, self.names, self.labels)

    def __getitem__(self, index: int) -> Example:
        with self.archive.open("rb") as file:
            file.seek(int(self.offsets[index]))
            data = file.read(int(self.sizes[index]))
        return {"image": data, "label": int(self.labels[index]), "id": printable(bytes(self.names[index]), MAX_MESSAGE)}


class Classes(NamedTuple):
    """The classes, from the development kit."""

    wordnet_ids: tuple[str, ...]
    """Sorted; a label is an index into them."""
    names: tuple[str, ...]
    """The classes' names in the same order."""
    validation_labels: np.ndarray
    """int32, in the order of the validation images' names."""


class _Member(NamedTuple):
    name: str
    offset: int
    size: int


def open_imagenet(folder: Path, on_count: Callable[[int], None] = lambda count: None) -> dict[str, ArchiveSource]:
    """The splits "train" and "validation" of the archives in `folder`.

    Reads every header of the archives, which takes minutes for the real ones.

    `on_count` is called with the number of images found so far, after every class and at the end. Raises SourceError
    with every archive that is missing, or that is damaged or incomplete.
    """
    if missing := [name for name in (TRAIN, VALIDATION, KIT) if not (folder / name).is_file()]:
        raise SourceError(
            f"imagenet:{folder}: {', '.join(missing)} missing. Expected the three archives of ILSVRC2012 (tasks 1 and "
            "2), from image-net.org/download-images. If the images are unpacked, use folder:PATH."
        )
    classes = read_classes(folder / KIT)
    train = _open_train(folder / TRAIN, classes, on_count)
    validation = _open_validation(folder / VALIDATION, classes)
    on_count(len(train) + len(validation))
    return {"train": train, "validation": validation}


def read_classes(kit: Path) -> Classes:
    """The classes and the validation images' labels, from the development kit.

    Raises InputError if it is damaged.
    """
    check_file(kit, _LARGEST_KIT, "the development kit")
    try:
        return _read_classes(kit)
    except (SourceError, MemoryError):
        raise
    except Exception as error:  # tarfile, its decompressors and scipy raise many kinds for foreign bytes
        reason = " ".join(str(error).split())
        raise SourceError(f"{kit} is damaged or cut off: {reason}. Download it again.") from error


def _read_classes(kit: Path) -> Classes:
    from scipy.io import loadmat  # a second to import; only needed here

    with tarfile.open(kit) as archive:
        members = {Path(member.name).name: member for member in archive.getmembers() if member.isfile()}
        wanted = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
        if missing := [name for name in wanted if name not in members]:
            raise SourceError(f"{kit} does not hold {', '.join(missing)}. Expected the kit of tasks 1 and 2 (t12).")
        meta, truth = (_read_member(archive, members[name]) for name in wanted)
    synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
    # The file also lists groups of classes (animal, ...), with numbers above 1000.
    leaves = [row for row in synsets if int(row["num_children"]) == 0]
    by_number = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
    words = {str(row["WNID"]): printable(str(row["words"]), MAX_MESSAGE) for row in leaves}
    ids = tuple(sorted(words))
    label_of = {wordnet_id: label for label, wordnet_id in enumerate(ids)}
    numbers = [int(line) for line in truth.split()]
    if unknown := sorted({number for number in numbers if number not in by_number}):
        raise SourceError(f"{kit}: the validation labels {unknown[:10]} are not in its meta.mat.")
    labels = np.array([label_of[by_number[number]] for number in numbers], np.int32)
    return Classes(ids, _distinct(ids, words), labels)


def _distinct(ids: tuple[str, ...], words: dict[str, str]) -> tuple[str, ...]:
    """Class names, with the WordNet id added to those of two classes, such as "crane"."""
    counts = Counter(words.values())
    return tuple(words[key] if counts[words[key]] == 1 else f"{words[key]} ({key})" for key in ids)


def _open_train(path: Path, classes: Classes, on_count: Callable[[int], None]) -> ArchiveSource:
    label_of = {name: label for label, name in enumerate(classes.wordnet_ids)}
    members: list[_Member] = []
    labels: list[int] = []
    for inner in list_members(path, 0):
        name = inner.name.removesuffix(".tar")
        if name not in label_of:
            raise SourceError(f"{path} holds {inner.name}, which is not a class of {KIT}. Expected one tar per class.")
        images = [
            _Member(f"{name}/{image.name}", image.offset, image.size) for image in list_members(path, inner.offset)
        ]
        members += images
        labels += [label_of[name]] * len(images)
        on_count(len(members))
    if absent := sorted(set(range(len(label_of))) - set(labels)):
        names = ", ".join(classes.wordnet_ids[label] for label in absent[:10])
        raise SourceError(f"{path} has no image of {len(absent)} classes: {names}. Is the download complete?")
    return _source(path, members, labels, classes)


def _open_validation(path: Path, classes: Classes) -> ArchiveSource:
    members = sorted(list_members(path, 0), key=lambda member: member.name)
    if len(members) != len(classes.validation_labels):
        raise SourceError(
            f"{path} holds {len(members)} images, and {KIT} has labels for {len(classes.validation_labels)}. Is the "
            "download complete?"
        )
    return _source(path, members, classes.validation_labels.tolist(), classes)


def list_members(path: Path, start: int) -> Iterator[_Member]:
    """The files of the tar archive that starts at byte `start` of the file `path`; reads only the headers.

    Raises SourceError if the archive is damaged or cut off.
    """
    with path.open("rb") as file:
        file.seek(start)
        end = path.stat().st_size
        try:
            # For a tar inside another, tarfile counts offsets from the start of the outer file.
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    if member.offset_data + member.size > end:
                        raise tarfile.ReadError("unexpected end of data")
                    if len(member.name) > _LONGEST_NAME:
                        raise tarfile.ReadError(f"a name of {len(member.name):,} characters")
                    if member.isfile():
                        yield _Member(Path(member.name).name, member.offset_data, member.size)
        except tarfile.TarError as error:
            raise SourceError(f"{path} is damaged or cut off: {error}. Download it again.") from error


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return b"" if file is None else file.read(_LARGEST_KIT)


def _source(path: Path, members: list[_Member], labels: list[int], classes: Classes) -> ArchiveSource:
    return ArchiveSource(
        archive=path,
        names=np.array([os.fsencode(member.name) for member in members], dtype=np.bytes_),
        offsets=np.array([member.offset for member in members], np.int64),
        sizes=np.array([member.size for member in members], np.int64),
        labels=np.array(labels, np.int32),
        class_names=classes.names,
    )

"""Data sets in TFDS's ArrayRecord layout, read without TensorFlow.

Images stay encoded; the transforms decode them. `python -m train prepare` makes such data sets from class folders and
from ImageNet's archives, and so does TFDS's download_and_prepare with file_format="array_record".
"""

import dataclasses
import functools
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from poolformer_jax.files import LARGEST_JSON, check_file
from poolformer_jax.messages import MAX_MESSAGE, printable, short_repr
from train.data.sources.source import Example, SourceError, digest_of, raising_source_errors

_LABELS_AT_ONCE = 256
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_NAMES_OF_IDS = ("file_name", "filename", "image/filename", "id")


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """A split of a TFDS data set. The records pickle as a list of files, which every process opens."""

    name: str
    records: Any
    class_names: tuple[str, ...]
    split: str
    id_key: str | None
    digest: str
    new_labels: np.ndarray | None = None
    """The label of each label in the records, if they were changed: int32 [classes]."""

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """See `Source.labels`: reads every record."""
        rows = range(len(self))
        parts = (rows[start : start + _LABELS_AT_ONCE] for start in rows[::_LABELS_AT_ONCE])
        return np.array([example["label"] for part in parts for example in self.__getitems__(part)], np.int32)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        with _naming(self.name):
            return self._example(index, self.records[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """Several examples, read by ArrayRecord's threads."""
        with _naming(self.name):
            records = self.records.__getitems__([int(index) for index in indices])
            return [self._example(index, record) for index, record in zip(indices, records)]

    def _example(self, index: int, record: dict[str, Any]) -> Example:
        name = f"{self.split}[{index}]"
        if self.id_key is not None:
            given = record[self.id_key]
            name = f"{name} {printable(given if isinstance(given, bytes) else str(given))}"
        label = int(record["label"])
        if self.new_labels is not None and label >= 0:  # -1: no label
            label = int(self.new_labels[label])
        return {"image": record["image"], "label": label, "id": name}

    def relabel(self, class_names: tuple[str, ...], new_labels: np.ndarray) -> "TfdsSource":
        """The source with other classes; `new_labels`, int32 [classes], holds the new label of each label."""
        digest = digest_of([self.digest, class_names], new_labels)
        return dataclasses.replace(self, class_names=class_names, new_labels=new_labels, digest=digest)


def open_tfds(name: str, split: str, data_dir: Path | None) -> TfdsSource:
    """The split named `split` of a prepared data set.

    `name` is a data set that TFDS finds in `data_dir`, or the folder of a prepared one. Splits may be slices such as
    "train[:90%]". Raises SourceError if it is not prepared, is not in ArrayRecord, has no such split, or has no image
    or label.
    """
    import tensorflow_datasets as tfds

    with _naming(name):
        builder = _find_builder(tfds, name, data_dir)
        features = builder.info.features
        _require_image_and_label(tfds, name, features)
        try:
            records = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        except NotImplementedError:
            raise SourceError(
                f"tfds:{name} is stored as {builder.info.file_format}, which has no random access. Expected "
                'ArrayRecord: prepare it again with file_format="array_record", or convert it with tfds convert_format.'
            ) from None
        except (ValueError, KeyError) as error:
            known = ", ".join(builder.info.splits) or "none"
            raise SourceError(f"tfds:{name} has no split {split!r}. It has: {known}. {error}") from error
        id_key = next((key for key in _NAMES_OF_IDS if key in features), None)
        classes = tuple(printable(label, MAX_MESSAGE) for label in features["label"].names)
        if len(set(classes)) != (expected := features["label"].num_classes):
            raise SourceError(f"tfds:{name} has {len(set(classes)):,} different names for its {expected:,} classes.")
        shards = {part: found.shard_lengths for part, found in builder.info.splits.items()}
        digest = digest_of([builder.info.full_name, split, shards, classes])
        return TfdsSource(name, records, classes, split, id_key, digest)


def _naming(name: str) -> AbstractContextManager[None]:
    """Turns what TFDS and ArrayRecord raise for damaged files into a SourceError that names the data set."""
    return raising_source_errors(f"tfds:{name} cannot be read")


@contextmanager
def _features_of_tfds_only(tfds: Any) -> Iterator[None]:
    """Refuses the classes of other packages in a features.json: TFDS would import any module that it names."""
    connector = tfds.features.FeatureConnector
    original = vars(connector)["cls_from_name"]

    def checked(name: str) -> Any:
        if not name.startswith("tensorflow_datasets."):
            raise SourceError(
                f"Its features.json names {short_repr(name)}, which is not a class of TFDS. Nothing was imported."
            )
        return original.__get__(None, connector)(name)

    connector.cls_from_name = staticmethod(checked)
    try:
        yield
    finally:
        connector.cls_from_name = original


def _find_builder(tfds: Any, name: str, data_dir: Path | None) -> Any:
    # Folders come first, because reading one needs no code of TFDS for that name.
    for folder in [Path(name), *([data_dir / name] if data_dir else [])]:
        if (found := _prepared_version(folder.expanduser())) is not None:
            check_file(found / "dataset_info.json", LARGEST_JSON, "the description of a TFDS data set")
            check_file(found / "features.json", LARGEST_JSON, "the features of a TFDS data set")
            for shard in found.glob("*.array_record*"):
                check_file(shard, sys.maxsize, "a shard of a TFDS data set")
            with _features_of_tfds_only(tfds):
                return tfds.builder_from_directory(found)
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError, AttributeError, ImportError) as error:
        raise SourceError(
            f"tfds:{name}: no prepared data set is there, and TFDS has none of that name. If `python -m train prepare` "
            "was interrupted, run it again to the end."
        ) from error
    if not builder.info.splits:
        raise SourceError(
            f"tfds:{name} is not prepared in {builder.data_dir}. Pack class folders or ImageNet's "
            "archives (python -m train prepare --help), or prepare TFDS's data set once in Python:\n"
            f"  tfds.builder({name!r}, data_dir=...).download_and_prepare(file_format='array_record')"
        )
    return builder


def _prepared_version(folder: Path) -> Path | None:
    """`folder` if it holds a data set, else its newest version that does."""
    if (folder / "dataset_info.json").is_file():
        return folder
    versions = [path.parent for path in folder.glob("*/dataset_info.json") if _VERSION.fullmatch(path.parent.name)]
    return max(versions, key=lambda path: [int(part) for part in path.name.split(".")], default=None)


def _require_image_and_label(tfds: Any, name: str, features: Any) -> None:
    good = (
        "image" in features
        and isinstance(features["image"], tfds.features.Image)
        and "label" in features
        and isinstance(features["label"], tfds.features.ClassLabel)
    )
    if not good:
        raise SourceError(
            f"tfds:{name} holds {', '.join(features)}. Expected an Image called image and a ClassLabel called label."
        )

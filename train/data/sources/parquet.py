"""Parquet as Hugging Face `datasets` writes it: a column of images {bytes, path} and a column of labels.

    PATH/data/train-00000-of-00002.parquet  PATH/data/validation-00000-of-00001.parquet    push_to_hub
    PATH/train.parquet  PATH/validation.parquet                                             to_parquet
    PATH/default/train/0000.parquet                                                          the Hub's converted branch

The names of the classes are in the metadata of the schema (`ClassLabel`), which `datasets` writes; else they are the
column's values. Reading a row reads its row group as a whole: `datasets` writes a hundred images and more into each,
often as one page, which cannot be read in part. The groups read last stay in memory. For fast random access pack larger
data sets with `python -m train prepare`.
"""

import dataclasses
import functools
import itertools
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from poolformer_jax.errors import MissingDependencyError
from poolformer_jax.files import LARGEST_JSON, files_below, why_unreadable
from poolformer_jax.images import ImageError
from poolformer_jax.messages import MAX_MESSAGE, first_few, printable
from poolformer_jax.network import ProblemType
from train.data.sources.columns import read_labels
from train.data.sources.folders import ALL_IMAGES
from train.data.sources.source import (
    SPLIT_NAMES,
    Example,
    LabelledSource,
    SourceError,
    digest_of,
    drawn_rows,
    is_misnamed_split,
    label_at,
    raising_source_errors,
    require_split,
    resolved,
)

_CACHE_BYTES = 2**28  # in every worker process
_MOST_EXPANSION = 16  # bytes of a column for each byte of its file
_MOST_ROWS_AT_A_TIME = 64  # of one large value, whose size the file may understate


@dataclasses.dataclass(frozen=True)
class ParquetSource(LabelledSource):
    """Rows of Parquet files. Every process opens the files when it reads them."""

    files: tuple[Path, ...]
    groups: np.ndarray
    """int64 [groups, 3]: the file, the row group in it, and the first of its rows."""
    rows: np.ndarray
    """int64 [n], the examples' rows, counted over all files."""
    labels: np.ndarray
    """int32 [n], or the targets of each image, float32 [n, k]."""
    ids: tuple[str, ...]
    class_names: tuple[str, ...]
    image_column: str

    @property
    def digest(self) -> str:
        """See `Source.digest`."""
        return digest_of([self.class_names, self.ids], self.rows, self.labels)

    @property
    def file_sizes(self) -> np.ndarray:
        """Bytes of each file: int64 [files]."""
        return np.array([file.stat().st_size for file in self.files], np.int64)

    def __getitem__(self, index: int) -> Example:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """Several examples; a row group is read once for all of its rows."""
        places_of: dict[tuple[Path, int, str], list[tuple[int, int]]] = {}
        for place, number in enumerate(np.searchsorted(self.groups[:, 2], self.rows[list(indices)], side="right") - 1):
            file, group, first = self.groups[number].tolist()
            row = int(self.rows[indices[place]]) - first
            places_of.setdefault((self.files[file], group, self.image_column), []).append((place, row))
        images: list[bytes | ImageError] = [b""] * len(indices)
        # Those in memory first, before others displace them.
        for key in sorted(places_of, key=_CACHE.__contains__, reverse=True):
            column = _CACHE.read(*key)
            with _naming_file(key[0]):
                for place, row in places_of[key]:
                    images[place] = _image_bytes(column[row].as_py())
        return [
            {"image": image, "label": label_at(self.labels, index), "id": self.ids[index]}
            for image, index in zip(images, indices)
        ]

    def select(self, rows: np.ndarray) -> "ParquetSource":
        """The source with only the examples `rows`."""
        ids = tuple(self.ids[row] for row in rows)
        return dataclasses.replace(self, rows=self.rows[rows], labels=self.labels[rows], ids=ids)


def open_parquet(
    path: str, split: str, held_out_share: float, image_column: str | None, label_column: str, problem: ProblemType
) -> ParquetSource:
    """The split named `split` of the Parquet files below `path`.

    Files are named after their splits, or lie in folders that are. The split "train+validation" has all rows. The
    columns are those of `DataConfig`. Raises SourceError if there is no such file, split or column, or if rows lack
    labels; MissingDependencyError if pyarrow is not installed.
    """
    _pyarrow()
    root = resolved(path)
    splits = _files_of_splits(root)
    every_file = tuple(file for files in splits.values() for file in files)
    if not every_file:
        raise SourceError(f"parquet:{path}: expected a .parquet file, or a folder with such files.")
    train = splits.get("train", every_file)
    named = _class_names(train[0], label_column) if problem != "regression" else None
    numbered = named is not None
    columns = (image_column or "image", *label_column.split(","))
    if split == ALL_IMAGES:
        return _open(root, every_file, columns, named, problem, numbered=numbered)
    if split in splits and (split != "train" or "validation" in splits):
        classes = named or _open(root, train, columns, None, problem).class_names
        return _open(root, splits[split], columns, classes, problem, numbered=numbered)
    require_split(f"parquet:{path}", split, splits)
    pool = _open(root, train, columns, named, problem, numbered=numbered)
    return pool.select(drawn_rows(split, pool.ids, pool.labels, held_out_share))


def parquet_splits(path: str) -> tuple[str, ...]:
    """The splits that the files are divided into; none if they are not divided."""
    return tuple(name for name in _files_of_splits(resolved(path)) if name)


def _files_of_splits(root: Path) -> Mapping[str, tuple[Path, ...]]:
    """The sorted files of each split by its name, "" if their names are not those of splits."""
    if root.is_file():
        return {"": (root,)}
    splits: dict[str, tuple[Path, ...]] = {}
    for file in sorted(file for file in files_below(root) if file.suffix == ".parquet"):
        split = SPLIT_NAMES.get(_first_word(file.name)) or SPLIT_NAMES.get(file.parent.name) or ""
        splits[split] = (*splits.get(split, ()), file)
    unnamed = splits.get("", ())
    odd = [
        file
        for file in unnamed
        if is_misnamed_split(_first_word(file.name)) or (file.parent != root and is_misnamed_split(file.parent.name))
    ]
    if unnamed and (odd or len(splits) > 1):
        example = (odd or unnamed)[0].relative_to(root)
        raise SourceError(
            f"{root} has files whose names are not those of splits, such as {printable(str(example))}. "
            f"Expected names that begin with one of {', '.join(SPLIT_NAMES)}."
        )
    return splits


def _first_word(name: str) -> str:
    return re.split(r"[-._]", name)[0]


def _open(
    root: Path,
    files: tuple[Path, ...],
    columns: tuple[str, ...],
    class_names: tuple[str, ...] | None,
    problem: ProblemType,
    *,
    numbered: bool = False,
) -> ParquetSource:
    groups: list[tuple[int, int, int]] = []
    ids: list[str] = []
    values: list[list[Any]] = [[] for _ in columns[1:]]
    for number, file in enumerate(files):
        name = printable(str(file.relative_to(root.parent if root.is_file() else root)))
        with _naming_file(file):
            groups += [(number, group, len(ids) + first) for group, first in enumerate(_first_rows(file, columns))]
            ids += _ids(file, columns[0], name)
            for column, found in zip(columns[1:], values):
                for batch in _batches(file, column, range(_open_file(file).num_row_groups)):
                    found += batch[column].to_pylist()
    labels, class_names = read_labels(values, columns[1:], class_names, problem, str(root), numbered=numbered)
    rows = np.arange(len(ids))
    return ParquetSource(files, np.array(groups, np.int64), rows, labels, tuple(ids), class_names, columns[0])


def _first_rows(file: Path, columns: Sequence[str]) -> list[int]:
    """The first row of each row group. Raises SourceError if a column is missing, or the numbers of rows disagree."""
    parquet = _open_file(file)
    if missing := [column for column in columns if column not in parquet.schema_arrow.names]:
        raise SourceError(
            f"{file} has no column {missing[0]!r}. It has: {first_few(parquet.schema_arrow.names)}. Name the columns "
            "with --data.image-column and --data.label-column."
        )
    rows = parquet.metadata.num_rows
    if rows > file.stat().st_size:  # compressed, a million equal rows take a few bytes
        raise SourceError(f"{file} has {rows:,} rows, more than bytes. Expected images in it.")
    *first, in_groups = itertools.accumulate(
        (parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)), initial=0
    )
    if in_groups != rows:
        raise SourceError(f"{file} is damaged: it has {rows:,} rows, and {in_groups:,} in its row groups.")
    return first


def _ids(file: Path, column: str, name: str) -> list[str]:
    """The place of every row, and the name of its image if the column has it."""
    parquet = _open_file(file)
    paths: list[Any] = [None] * parquet.metadata.num_rows
    type_ = parquet.schema_arrow.field(column).type
    if type_.num_fields and type_.get_field_index("path") >= 0:
        batches = _batches(file, f"{column}.path", range(parquet.num_row_groups))
        paths = [image and image["path"] for batch in batches for image in batch[column].to_pylist()]
    return [f"{name}[{row}]{f' {printable(path)}' if path else ''}" for row, path in enumerate(paths)]


def _class_names(file: Path, column: str) -> tuple[str, ...] | None:
    """The names that `datasets` writes into the metadata of the schema; None without."""
    with _naming_file(file):
        text = (_open_file(file).schema_arrow.metadata or {}).get(b"huggingface", b"")
    if len(text) > LARGEST_JSON:
        raise SourceError(f"{file} has {len(text):,} bytes of JSON in its schema. Expected at most {LARGEST_JSON:,}.")
    try:
        feature = json.loads(text)["info"]["features"][column]
        names = feature.get("feature", feature)["names"]  # a list of classes has the feature of its items
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return tuple(printable(name, MAX_MESSAGE) for name in names)


def _image_bytes(value: Any) -> bytes | ImageError:
    found = value.get("bytes") if isinstance(value, dict) else value
    return found if isinstance(found, bytes) else ImageError("its row has no bytes of an image")


@functools.lru_cache(maxsize=64)
def _open_file(file: Path) -> Any:
    _, parquet = _pyarrow()
    with _naming_file(file):
        if (reason := why_unreadable(file)) is not None:
            raise SourceError(f"{file} {reason}. Expected a Parquet file.")
        return parquet.ParquetFile(file, memory_map=True, page_checksum_verification=True)


def _naming_file(file: Path) -> AbstractContextManager[None]:
    """Turns what pyarrow raises for a damaged file into a SourceError that names it."""
    return raising_source_errors(f"{file} cannot be read as Parquet")


def _batches(file: Path, column: str, groups: Sequence[int]) -> Iterator[Any]:
    """A column of some row groups, a few rows at a time.

    Raises SourceError if it takes much more memory than the file: compressed, equal values take next to no bytes there.
    """
    parquet, limit = _open_file(file), _MOST_EXPANSION * file.stat().st_size + _CACHE_BYTES
    found = [parquet.metadata.row_group(group) for group in groups]
    # No value is larger than its group. (The sizes of a column are not asked for: pyarrow ends the process with an
    # uncaught C++ exception if they are damaged.)
    largest = max((group.total_byte_size for group in found), default=1)
    at_a_time = min(max(limit // max(largest, 1), 1), _MOST_ROWS_AT_A_TIME)
    size, rows = 0, 0
    batches = parquet.iter_batches(at_a_time, groups, [column], use_threads=False)
    while True:
        with _naming_file(file):
            if (batch := next(batches, None)) is None:
                break
        size, rows = size + batch.nbytes, rows + len(batch)
        if size > limit:
            raise SourceError(f"{file}: its column {column} has more than {limit:,} bytes. Expected less.")
        yield batch
    if rows != (expected := sum(group.num_rows for group in found)):
        raise SourceError(f"{file} is damaged: it has {expected:,} rows, and {rows:,} in its column {column}.")


class _GroupCache:
    """The images of the row groups that were read last: up to `limit` bytes, and at least one group."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._groups: dict[tuple[Path, int, str], Any] = {}  # the one used last is the last
        self._lock = threading.Lock()  # also because a ParquetFile has one position in its file

    def __contains__(self, key: tuple[Path, int, str]) -> bool:
        return key in self._groups

    def read(self, file: Path, group: int, column: str) -> Any:
        """The column of images of a row group."""
        key = (file, group, column)
        with self._lock:
            if (images := self._groups.pop(key, None)) is None:
                pyarrow, _ = _pyarrow()
                images = pyarrow.Table.from_batches(_batches(file, column, [group]))[column]
            self._groups[key] = images
            while len(self._groups) > 1 and sum(kept.nbytes for kept in self._groups.values()) > self._limit:
                del self._groups[next(iter(self._groups))]
            return images


_CACHE = _GroupCache(_CACHE_BYTES)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependencyError(
            "Reading Parquet needs pyarrow. Install it with: pip install -e '.[parquet]'"
        ) from error
    return pyarrow, parquet

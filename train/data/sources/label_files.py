"""Images named in a CSV or JSONL file with their labels, as Hugging Face's `imagefolder` describes them.

    file_name,label                    {"file_name": "photos/1.jpg", "label": "tench"}
    photos/1.jpg,tench                 {"file_name": "photos/9.jpg", "label": "goldfish"}

Paths are relative to the file. The splits are in a column `split`, or in one file each: `PATH/train.csv`,
`PATH/validation.csv`, or `PATH/train/metadata.csv`, `PATH/validation/metadata.csv`. Without a validation split, a share
of every class is held out, chosen by the images' names.
"""

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from poolformer_jax.files import why_unreadable
from poolformer_jax.messages import MAX_MESSAGE, first_few, printable
from train.data.config import ProblemType
from train.data.sources.columns import read_labels, require_values
from train.data.sources.folders import ALL_IMAGES, FolderSource
from train.data.sources.source import SPLIT_NAMES, SourceError, held_out_rows, resolved

SUFFIXES = (".csv", ".jsonl")
_SPLIT_COLUMN = "split"
_LARGEST = 1 << 30  # bytes
# In memory every path takes the space of the longest one: at most so many times the file's size in all.
_MOST_PADDING = 64
# The values of each row: the image's path, the labels, and the split or None. A dict would take three times the memory.
Rows = list[tuple[Any, ...]]


def open_label_file(
    path: str, split: str, held_out_share: float, image_column: str | None, label_column: str, problem: ProblemType
) -> FolderSource:
    """The split named `split` of the images that the file, or the files of the folder, `path` names.

    The split "train+validation" has all rows. The columns are those of `DataConfig`. Raises SourceError if there is no
    such file, split or column, or if rows lack values.
    """
    root, image_column = resolved(path), image_column or "file_name"
    columns = (image_column, *label_column.split(","))
    splits = _rows_of_splits(root, path, columns)
    all_rows = [row for rows in splits.values() for row in rows]
    train = splits.get("train", all_rows)
    pool = _source(root, all_rows if split == ALL_IMAGES else train, None, columns, problem, path)
    if split == ALL_IMAGES:
        return pool
    if split in splits and (split != "train" or "validation" in splits):
        return _source(root, splits[split], pool.class_names, columns, problem, path)
    if split not in ("train", "validation"):
        raise SourceError(f"labels:{path} has no split {split!r}. It has: {', '.join(splits) or 'train, validation'}.")
    names = [os.fsdecode(bytes(name)) for name in pool.names]
    chosen = held_out_rows(names, pool.labels, held_out_share)
    return pool.select(np.flatnonzero(chosen == (split == "validation")))


def _rows_of_splits(root: Path, path: str, columns: Sequence[str]) -> Mapping[str, Rows]:
    """The rows of each split by its name, "" if they are not divided; image paths are relative to the folder `root`."""
    if root.is_dir():
        found = {
            split: file for split in sorted(set(SPLIT_NAMES.values())) if (file := _split_file(root, split)) is not None
        }
        if not found:
            raise SourceError(
                f"labels:{path}: {root} has no file of labels. Expected train.csv or train.jsonl and the same for "
                "validation, or metadata.csv or metadata.jsonl in folders of these names; or give the file itself."
            )
        return {split: _read(file, columns, root) for split, file in found.items()}
    rows = _read(root, columns, root.parent)
    if all(row[-1] is None for row in rows):
        return {"": rows}
    require_values([row[-1] for row in rows], _SPLIT_COLUMN, str(root))
    splits: dict[str, Rows] = {}
    for row in rows:
        name = str(row[-1])
        splits.setdefault(SPLIT_NAMES.get(name, name), []).append(row)
    return splits


def _split_file(root: Path, split: str) -> Path | None:
    names = [name for name, meaning in SPLIT_NAMES.items() if meaning == split]
    files = [root / f"{name}{suffix}" for name in names for suffix in SUFFIXES]
    files += [root / name / f"metadata{suffix}" for name in names for suffix in SUFFIXES]
    return next((file for file in files if file.is_file()), None)


def _read(file: Path, columns: Sequence[str], root: Path) -> Rows:
    """The rows of a file, with image paths relative to `root`."""
    try:
        if (reason := why_unreadable(file, _LARGEST)) is not None:
            raise ValueError(f"it {reason}")
        with file.open(encoding="utf-8-sig", newline="") as stream:
            if file.suffix.lower() == ".jsonl":
                rows = _values((json.loads(line) for line in stream if line.strip()), columns, file)
            elif file.suffix.lower() == ".csv":
                rows = _values(csv.DictReader(stream), columns, file)
            else:
                raise SourceError(f"labels:{file}: expected a file that ends in {' or '.join(SUFFIXES)}, or a folder.")
    except OSError as error:
        raise SourceError(f"labels:{file} cannot be read: {error.strerror}.") from error
    except (ValueError, csv.Error, RecursionError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"labels:{file} cannot be read: {error}. Expected CSV with a header, or JSONL.") from error
    require_values([row[0] for row in rows], columns[0], str(file))
    longest = max((len(str(row[0])) for row in rows), default=0)
    if longest * len(rows) > _MOST_PADDING * file.stat().st_size:
        raise SourceError(f"{file} has a path of {longest:,} characters beside short ones. Expected paths of images.")
    inside = file.parent.relative_to(root)
    return [(os.path.normpath(inside / str(path)), *rest) for path, *rest in rows]


def _values(parsed: Iterable[Any], columns: Sequence[str], file: Path) -> Rows:
    """The values of the columns, and of the column `split`, in each row."""
    rows: Rows = []
    for number, row in enumerate(parsed, 1):
        if not isinstance(row, dict):
            raise SourceError(f"{file}: row {number} is not a JSON object. Expected one object in each line.")
        if number == 1 and (missing := [column for column in columns if column not in row]):
            raise SourceError(
                f"{file} has no column {missing[0]!r}. It has: {first_few(list(map(str, row)))}. Name the columns with "
                "--data.image-column and --data.label-column."
            )
        rows.append((*map(row.get, columns), row.get(_SPLIT_COLUMN)))
    return rows


def _source(
    root: Path,
    rows: Rows,
    classes: tuple[str, ...] | None,
    columns: tuple[str, ...],
    problem: ProblemType,
    path: str,
) -> FolderSource:
    values = [[row[1 + place] for row in rows] for place in range(len(columns) - 1)]
    labels, classes = read_labels(values, columns[1:], classes, problem, f"labels:{path}")
    names = np.array([os.fsencode(row[0]) for row in rows], dtype=np.bytes_)
    return FolderSource(
        root if root.is_dir() else root.parent, names, labels, tuple(printable(name, MAX_MESSAGE) for name in classes)
    )

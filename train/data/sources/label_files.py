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
from collections.abc import Mapping, Sequence
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
Rows = list[dict[str, Any]]


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
    if not rows or _SPLIT_COLUMN not in rows[0]:
        return {"": rows}
    require_values([row[_SPLIT_COLUMN] for row in rows], _SPLIT_COLUMN, str(root))
    splits: dict[str, Rows] = {}
    for row in rows:
        name = str(row[_SPLIT_COLUMN])
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
                rows: Rows = [json.loads(line) for line in stream if line.strip()]
            elif file.suffix.lower() == ".csv":
                rows = list(csv.DictReader(stream))
            else:
                raise SourceError(f"labels:{file}: expected a file that ends in {' or '.join(SUFFIXES)}, or a folder.")
    except OSError as error:
        raise SourceError(f"labels:{file} cannot be read: {error.strerror}.") from error
    except (ValueError, csv.Error, RecursionError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"labels:{file} cannot be read: {error}. Expected CSV with a header, or JSONL.") from error
    if bad := [number for number, row in enumerate(rows, 1) if not isinstance(row, dict)]:
        raise SourceError(f"{file}: row {bad[0]} is not a JSON object. Expected one object in each line.")
    for column in columns:
        if rows and column not in rows[0]:
            raise SourceError(
                f"{file} has no column {column!r}. It has: {first_few(list(map(str, rows[0])))}. Name the columns with "
                "--data.image-column and --data.label-column."
            )
    require_values([row.get(columns[0]) for row in rows], columns[0], str(file))
    inside = file.parent.relative_to(root)
    return [{**row, columns[0]: os.path.normpath(inside / str(row[columns[0]]))} for row in rows]


def _source(
    root: Path,
    rows: Rows,
    classes: tuple[str, ...] | None,
    columns: tuple[str, ...],
    problem: ProblemType,
    path: str,
) -> FolderSource:
    values = [[row.get(column) for row in rows] for column in columns[1:]]
    labels, classes = read_labels(values, columns[1:], classes, problem, f"labels:{path}")
    names = np.array([os.fsencode(row[columns[0]]) for row in rows], dtype=np.bytes_)
    return FolderSource(
        root if root.is_dir() else root.parent, names, labels, tuple(printable(name, MAX_MESSAGE) for name in classes)
    )

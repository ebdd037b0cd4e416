"""Images named in a CSV or JSONL file with their labels, as Hugging Face's `imagefolder` describes them.

    file_name,label                    {"file_name": "photos/1.jpg", "label": "tench"}
    photos/1.jpg,tench                 {"file_name": "photos/9.jpg", "label": "goldfish"}

Paths are relative to the file. The splits are in a column `split`, or in one file each: `PATH/train.csv`,
`PATH/validation.csv`, or `PATH/train/metadata.csv`, `PATH/validation/metadata.csv`. Without a validation split, a share
of every class is held out, chosen by the images' names. An image has one row.
"""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from poolformer_jax.files import why_unreadable
from poolformer_jax.messages import MAX_MESSAGE, first_few, printable
from poolformer_jax.network import ProblemType
from train.data.sources.columns import check_labels, read_labels, require_values
from train.data.sources.folders import ALL_IMAGES, FolderSource
from train.data.sources.source import SPLIT_NAMES, SourceError, drawn_rows, is_misnamed_split, require_split, resolved

SUFFIXES = (".csv", ".jsonl")
_SPLIT_COLUMN = "split"
_LARGEST = 1 << 30  # bytes
# NumPy gives every path the memory of the longest one. The limit is this many times the size of the file.
_MOST_PADDING = 64
# The values of each row: the image's path, the labels, the split or None, and the line in the file. A dict would take
# three times the memory.
Rows = list[tuple[Any, ...]]


def open_label_file(
    path: str, split: str, held_out_share: float, image_column: str | None, label_column: str, problem: ProblemType
) -> FolderSource:
    """The split named `split` of the images that the file, or the files of the folder, `path` names.

    The split "train+validation" has all rows. The columns are those of `DataConfig`. Raises SourceError if there is no
    such file, split or column, if rows lack values, or if two rows that are used name the same image.
    """
    root, columns = resolved(path), (image_column or "file_name", *label_column.split(","))
    splits = _rows_of_splits(root, path, columns, problem)
    all_rows = [row for rows in splits.values() for row in rows]
    train = splits.get("train", all_rows)
    used = ("train", split) if "train" in splits and split != ALL_IMAGES else tuple(splits)
    _refuse_repeated({name: rows for name, rows in splits.items() if name in used}, path)
    pool = _source(root, all_rows if split == ALL_IMAGES else train, None, columns, problem, path)
    if split == ALL_IMAGES:
        return pool
    if split in splits and (split != "train" or "validation" in splits):
        return _source(root, splits[split], pool.class_names, columns, problem, path)
    require_split(f"labels:{path}", split, splits)
    return pool.select(drawn_rows(split, pool.names.tolist(), pool.labels, held_out_share))


def label_file_splits(path: str, image_column: str | None, label_column: str, problem: ProblemType) -> tuple[str, ...]:
    """The splits that the rows are divided into; none if they are not divided."""
    columns = (image_column or "file_name", *label_column.split(","))
    return tuple(name for name in _rows_of_splits(resolved(path), path, columns, problem) if name)


def _refuse_repeated(splits: Mapping[str, Rows], path: str) -> None:
    """Raises SourceError if an image has two rows: it would be trained on and held out, or have two labels."""
    first: dict[str, tuple[str, tuple[Any, ...]]] = {}
    repeated = []
    for split, rows in splits.items():
        for row in rows:
            if first.setdefault(row[0], (split, row))[1] is not row:
                repeated.append((split, row))
    if not repeated:
        return
    name = repeated[0][1][0]
    lines = [
        f"{first_few([str(value) for value in row[1:-2]])} in line {row[-1]}{f' of {split}' if split else ''}"
        for split, row in (first[name], repeated[0])
    ]
    raise SourceError(
        f"labels:{path}: rows that name an image again: {len(repeated):,}; the first image is {printable(name)}, as "
        f"{' and as '.join(lines)}. Expected one row for each image; with --data.problem-type "
        "multi_label_classification it may have several classes."
    )


def _rows_of_splits(root: Path, path: str, columns: Sequence[str], problem: ProblemType) -> Mapping[str, Rows]:
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
        odd = [file.name for file in root.iterdir() if is_misnamed_split(file.stem) and _has_labels(file)]
        if "validation" not in found and odd:
            raise SourceError(
                f"labels:{path}: {first_few(odd)} in {root} would not be read. Expected names that begin with one of "
                f"{', '.join(SPLIT_NAMES)}, in lower case."
            )
        return {split: _read(file, columns, root, problem) for split, file in found.items()}
    rows = _read(root, columns, root.parent, problem)
    if all(row[-2] is None for row in rows):
        return {"": rows}
    require_values([row[-2] for row in rows], _SPLIT_COLUMN, str(root), [row[-1] for row in rows])
    splits: dict[str, Rows] = {}
    for row in rows:
        name = str(row[-2]).strip()
        splits.setdefault(SPLIT_NAMES.get(name.lower(), name), []).append(row)
    return splits


def _split_file(root: Path, split: str) -> Path | None:
    names = [name for name, meaning in SPLIT_NAMES.items() if meaning == split]
    files = [root / f"{name}{suffix}" for name in names for suffix in SUFFIXES]
    files += [root / name / f"metadata{suffix}" for name in names for suffix in SUFFIXES]
    return next((file for file in files if file.is_file()), None)


def _has_labels(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES or any((path / f"metadata{suffix}").is_file() for suffix in SUFFIXES)


def _read(file: Path, columns: Sequence[str], root: Path, problem: ProblemType) -> Rows:
    """The rows of a file, with image paths relative to `root`."""
    try:
        if (reason := why_unreadable(file, _LARGEST)) is not None:
            raise ValueError(f"it {reason}")
        with file.open(encoding="utf-8-sig", newline="") as stream:
            if file.suffix.lower() not in SUFFIXES:
                raise SourceError(f"labels:{file}: expected a file that ends in {' or '.join(SUFFIXES)}, or a folder.")
            parse = _parse_jsonl if file.suffix.lower() == ".jsonl" else _parse_csv
            rows = _values(parse(stream), columns, file)
    except OSError as error:
        raise SourceError(f"labels:{file} cannot be read: {error.strerror}.") from error
    except (ValueError, csv.Error, RecursionError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"labels:{file} cannot be read: {error}. Expected CSV with a header, or JSONL.") from error
    lines = [row[-1] for row in rows]
    require_values([row[0] for row in rows], columns[0], str(file), lines)
    check_labels(_label_columns(rows, columns), columns[1:], problem, str(file), lines)
    longest = max((len(str(row[0])) for row in rows), default=0)
    if longest * len(rows) > _MOST_PADDING * file.stat().st_size:
        raise SourceError(f"{file} has a path of {longest:,} characters beside short ones. Expected paths of images.")
    inside, from_windows = file.parent.relative_to(root), _is_from_windows(file.parent, rows)
    paths = (str(row[0]).replace("\\", "/") if from_windows else str(row[0]) for row in rows)
    return [(os.path.normpath(inside / path), *row[1:]) for path, row in zip(paths, rows)]


def _is_from_windows(folder: Path, rows: Rows) -> bool:
    r"""True if a \ in the paths separates folders: the first such path is a file with / and not as it is."""
    path = next((str(row[0]) for row in rows if "\\" in str(row[0])), None)
    try:
        return path is not None and not (folder / path).exists() and (folder / path.replace("\\", "/")).exists()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def _parse_jsonl(stream: TextIO) -> Iterator[tuple[int, Any]]:
    for line, text in enumerate(stream, 1):
        if text.strip():
            try:
                yield line, json.loads(text.rstrip())
            except json.JSONDecodeError as error:
                raise ValueError(f"{error.msg} in line {line}, column {error.colno}") from error


def _parse_csv(stream: TextIO) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(stream)
    for row in reader:
        yield reader.line_num, row


def _values(parsed: Iterable[tuple[int, Any]], columns: Sequence[str], file: Path) -> Rows:
    """The values of the columns and of the column `split` in each row, and its line."""
    rows: Rows = []
    for line, row in parsed:
        if not isinstance(row, dict):
            raise SourceError(f"{file}: line {line} is not a JSON object. Expected one object in each line.")
        if not rows and (missing := [column for column in columns if column not in row]):
            names = [str(name) for name in row if name is not None]
            remedy = "Name the columns with --data.image-column and --data.label-column"
            if len(names) == 1 and any(separator in names[0] for separator in ";\t"):
                remedy = "Separate the columns with commas"
            raise SourceError(f"{file} has no column {missing[0]!r}. It has: {first_few(names)}. {remedy}.")
        if None in row:  # where DictReader puts what is left of a row
            raise SourceError(
                f'{file}: line {line} has more values than the header has columns. Write a value with a comma as "a,b".'
            )
        rows.append((*map(row.get, columns), row.get(_SPLIT_COLUMN), line))
    return rows


def _label_columns(rows: Rows, columns: Sequence[str]) -> list[list[Any]]:
    return [[row[place] for row in rows] for place in range(1, len(columns))]


def _source(
    root: Path,
    rows: Rows,
    classes: tuple[str, ...] | None,
    columns: tuple[str, ...],
    problem: ProblemType,
    path: str,
) -> FolderSource:
    labels, classes = read_labels(_label_columns(rows, columns), columns[1:], classes, problem, f"labels:{path}")
    names = np.array([os.fsencode(row[0]) for row in rows], dtype=np.bytes_)
    return FolderSource(
        root if root.is_dir() else root.parent, names, labels, tuple(printable(name, MAX_MESSAGE) for name in classes)
    )

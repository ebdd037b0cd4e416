"""Labels and targets from the columns of a table, such as a CSV file or Parquet."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from poolformer_jax.messages import first_few, short_repr
from poolformer_jax.network import ProblemType
from train.data.sources.folders import natural_key
from train.data.sources.source import SourceError

_LARGEST = float(np.finfo(np.float32).max)
_SEPARATOR = "|"
_TRAIN_ON_SEVERAL = (
    "To train on several, use --data.problem-type multi_label_classification (numbers: regression); prepare packs "
    "images with one class only, so train on their table as it is."
)


def read_labels(
    values: Sequence[Sequence[Any]],
    columns: Sequence[str],
    class_names: tuple[str, ...] | None,
    problem: ProblemType,
    where: str,
    *,
    numbered: bool = False,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The labels of a table's rows and the names of the classes.

    Args:
        values: of each column, by row. One class per image: a name or a number. Several: a list of names or numbers,
            or names separated by "|"; with more than one column, 0 or 1 for the class that the column is named after.
            Regression: numbers. Spaces around a name do not count.
        columns: their names.
        class_names: the classes in the order of their labels. None: those of the rows, sorted as class folders are.
        problem: whether an image has one class, several, or numbers.
        where: the table, for messages.
        numbered: numbers are labels, indices into `class_names`. Otherwise they are names: classes 1 to 3 get the
            labels 0 to 2.

    Returns:
        int32 [n], or for several classes or numbers float32 [n, k]; and the classes, or for regression the columns.

    Raises:
        SourceError: with the values that are not classes or numbers.
    """
    values = [[value.strip() if isinstance(value, str) else value for value in column] for column in values]
    check_labels(values, columns, problem, where)
    if problem == "regression" or (problem == "multi_label_classification" and len(columns) > 1):
        targets = np.stack([_numbers(column, name, where) for column, name in zip(values, columns)], axis=1)
        if problem == "multi_label_classification" and not np.isin(targets, (0, 1)).all():
            raise SourceError(f"{where}: the columns {first_few(list(columns))} hold other numbers than 0 and 1.")
        return targets, tuple(columns)
    rows: list[Sequence[Any]] = [
        [value] if problem == "single_label_classification" else _several(value) for value in values[0]
    ]
    flat = [value for row in rows for value in row]
    if class_names is not None and numbered and not any(isinstance(value, str) for value in flat):
        # -1 marks a split without labels; reading a batch raises the error for it.
        if wrong := [value for value in flat if not _is_label(value, len(class_names))]:
            raise SourceError(
                f"{where} has the label {short_repr(wrong[0])}. Expected whole numbers from 0 to "
                f"{len(class_names) - 1}."
            )
        labels, names = np.array(flat, np.int32), class_names
    else:
        texts = [str(value) for value in flat]
        names = class_names or tuple(sorted(set(texts), key=natural_key))
        label_of = {name: label for label, name in enumerate(names)}
        if unknown := sorted(set(texts) - label_of.keys(), key=natural_key):
            raise SourceError(f"{where} has classes that training does not have: {first_few(unknown)}.")
        labels = np.array([label_of[text] for text in texts], np.int32)
    if problem == "single_label_classification":
        return labels, names
    targets = np.zeros((len(rows), len(names)), np.float32)
    targets[np.repeat(np.arange(len(rows)), [len(row) for row in rows]), labels] = 1
    return targets, names


def check_labels(
    values: Sequence[Sequence[Any]],
    columns: Sequence[str],
    problem: ProblemType,
    where: str,
    lines: Sequence[int] | None = None,
) -> None:
    """Raises SourceError if rows lack a label or have several where one is expected.

    The arguments are those of `read_labels`; `lines` are those of `require_values`.
    """
    if problem == "single_label_classification":
        _refuse_several(values, columns, where, lines)
    if problem != "multi_label_classification" or len(columns) > 1:  # else no name means no class
        for column, found in zip(columns, values):
            require_values(found, column, where, lines)


def _refuse_several(
    values: Sequence[Sequence[Any]], columns: Sequence[str], where: str, lines: Sequence[int] | None
) -> None:
    """Raises SourceError at the first value with several classes, which would become one class with a long name."""
    if len(columns) > 1:
        raise SourceError(
            f"{where}: {first_few(columns)} are several columns of labels. Expected one. {_TRAIN_ON_SEVERAL}"
        )
    for row, value in enumerate(values[0]):
        if isinstance(value, list) or (isinstance(value, str) and _SEPARATOR in value):
            raise SourceError(
                f"{where}: {_place(row, lines)} has several classes in {columns[0]!r}: {short_repr(value)}. Expected "
                f"one. {_TRAIN_ON_SEVERAL}"
            )


def _is_label(value: Any, classes: int) -> bool:
    return isinstance(value, int | float) and -1 <= value < classes and value == int(value)


def _several(value: Any) -> Sequence[Any]:
    """The classes of an image: a list, or names in one text."""
    if isinstance(value, str):
        return [name.strip() for name in value.split(_SEPARATOR) if name.strip()]
    return value if isinstance(value, list) else [] if value is None else [value]


def _numbers(values: Sequence[Any], column: str, where: str) -> np.ndarray:
    if wrong := [value for value in values if not _is_number(value)]:
        raise SourceError(f"{where}: the column {column!r} holds {short_repr(wrong[0])}. Expected finite numbers.")
    return np.array([float(value) for value in values], np.float32)


def _is_number(value: Any) -> bool:
    try:
        return abs(float(value)) <= _LARGEST
    except (TypeError, ValueError, OverflowError):
        return False


def require_values(values: Sequence[Any], column: str, where: str, lines: Sequence[int] | None = None) -> None:
    """Raises SourceError with the line of the first row without a value, or its number if `lines` is None."""
    if missing := [row for row, value in enumerate(values) if value is None or value == ""]:
        others = f" (nor do {len(missing) - 1:,} others)" if len(missing) > 1 else ""
        raise SourceError(
            f"{where}: {_place(missing[0], lines)} has no {column!r}{others}. Expected a value in every row."
        )


def _place(row: int, lines: Sequence[int] | None) -> str:
    return f"row {row + 1}" if lines is None else f"line {lines[row]}"

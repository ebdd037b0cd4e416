"""Labels from the column of a table, such as a CSV file or Parquet."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from poolformer_jax.messages import first_few
from train.data.sources.folders import natural_key
from train.data.sources.source import SourceError


def class_names_of(values: Sequence[Any]) -> tuple[str, ...]:
    """The classes in a column of names or numbers, sorted as class folders are: numbers by value."""
    return tuple(sorted({str(value) for value in values}, key=natural_key))


def labels_of(values: Sequence[Any], class_names: tuple[str, ...], where: str) -> np.ndarray:
    """The label of each value of a column: int32 [n].

    Args:
        values: names of classes.
        class_names: the classes, in the order of their labels.
        where: the table, for messages.

    Raises:
        SourceError: with the values that are not classes, or if a row has no value.
    """
    label_of = {name: label for label, name in enumerate(class_names)}
    names = [str(value) for value in values]
    if unknown := sorted(set(names) - label_of.keys(), key=natural_key):
        raise SourceError(f"{where} has classes that training does not have: {first_few(unknown)}.")
    return np.array([label_of[name] for name in names], np.int32)


def require_values(values: Sequence[Any], column: str, where: str) -> None:
    """Raises SourceError with the number of the first row without a value."""
    if missing := [row for row, value in enumerate(values) if value is None or value == ""]:
        raise SourceError(
            f"{where}: row {missing[0] + 1} has no {column!r}, and {len(missing) - 1} more rows. Expected a value in "
            "every row."
        )

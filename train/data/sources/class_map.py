"""A file that says which label each class has, for data whose order of classes is not the model's."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from poolformer_jax.files import why_unreadable
from poolformer_jax.messages import first_few
from train.data.sources.source import SourceError

_EXPECTED = "Expected a text file with one class name per line, in the order of the labels, or JSON {name: label}"
_LARGEST = 1 << 22  # bytes


def read_class_map(path: Path) -> tuple[str, ...]:
    """The class names in a file, in the order of their labels.

    Raises SourceError if the file cannot be read, repeats a name, or does not number its classes 0, 1, 2, ...
    """
    path = path.expanduser()
    try:
        if (reason := why_unreadable(path, _LARGEST)) is not None:
            raise ValueError(f"it {reason}")
        text = path.read_text(encoding="utf-8-sig")
        names = _names_in_json(json.loads(text)) if path.suffix.lower() == ".json" else text.splitlines()
    except OSError as error:
        raise SourceError(f"The class map {path} cannot be read: {error.strerror}. {_EXPECTED}.") from error
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError and JSONDecodeError
        raise SourceError(f"The class map {path} cannot be read: {error}. {_EXPECTED}.") from error
    names = [name.strip() for name in names if name.strip()]
    if repeated := sorted(name for name, count in Counter(names).items() if count > 1):
        raise SourceError(f"The class map {path} has {first_few(repeated)} more than once. {_EXPECTED}.")
    return tuple(names)


def labels_by_map(path: Path, class_map: tuple[str, ...], data: str, class_names: tuple[str, ...]) -> np.ndarray:
    """The label that the class map gives to each class of the data: int32 [classes].

    Raises SourceError with the classes that the map does not have.
    """
    label_of = {name: label for label, name in enumerate(class_map)}
    if unknown := [name for name in class_names if name not in label_of]:
        raise SourceError(
            f"The class map {path} does not name these classes of {data}: {first_few(unknown)}. {_EXPECTED}."
        )
    return np.array([label_of[name] for name in class_names], np.int32)


def relabel_by_map(source: Any, path: Path, data: str) -> Any:
    """A source with the classes and labels of the class map.

    Raises SourceError if the map cannot be read, or lacks classes of the source.
    """
    names = read_class_map(path)
    return source.relabel(names, labels_by_map(path, names, data, source.class_names))


def _names_in_json(value: Any) -> list[str]:
    if not isinstance(value, dict) or not all(type(label) is int for label in value.values()):
        raise ValueError("it is not an object whose values are whole numbers")
    by_label = sorted(value, key=value.__getitem__)
    if [value[name] for name in by_label] != list(range(len(value))):
        raise ValueError(f"its labels are not 0 to {len(value) - 1}, each of them once")
    return by_label

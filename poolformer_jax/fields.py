"""Checks and conversions for the fields of frozen config dataclasses.

A config reports everything that is wrong with it in one ValueError.
"""

import dataclasses
import math
import numbers
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from poolformer_jax.errors import InputError
from poolformer_jax.messages import short_repr

_LARGEST = 1 << 63  # NumPy and jax have no larger integers, and JSON has them of any length
_Key = TypeVar("_Key")
_Value = TypeVar("_Value", covariant=True)


def check_rules(config: object, rules: Sequence[tuple[str, object, str]]) -> None:
    """Checks every rule: the name of a field, whether its value is valid, and what is expected of it.

    Raises ValueError, naming every field with an invalid value, the value given and what was expected.
    """
    problems = [
        f"{name}={short_repr(getattr(config, name))}: expected {expected}."
        for name, valid, expected in rules
        if not valid
    ]
    if problems:
        raise InputError(f"{type(config).__name__} cannot work:\n  " + "\n  ".join(problems))


@dataclasses.dataclass(frozen=True)
class Range:
    """Values that a field may have."""

    description: str
    contains: Callable[[Any], bool]


POSITIVE = Range("a positive number", lambda value: value > 0)
NOT_NEGATIVE = Range("0 or a positive number", lambda value: value >= 0)
AT_LEAST_1 = Range("at least 1", lambda value: value >= 1)
BELOW_1 = Range("a number in [0, 1)", lambda value: 0 <= value < 1)
PROBABILITY = Range("a probability from 0 to 1", lambda value: 0 <= value <= 1)


def or_none(allowed: Range) -> Range:
    """None, and the same values."""
    return Range(f"None, or {allowed.description}", lambda value: value is None or allowed.contains(value))


def between(smallest: int, largest: int) -> Range:
    """The numbers from `smallest` to `largest`."""
    return Range(f"{smallest:,} to {largest:,}", lambda value: smallest <= value <= largest)


def one_of(options: Collection[str]) -> Range:
    """These texts."""
    return Range(f"one of {', '.join(options)}", lambda value: value in options)


def in_range(config: object, allowed: Range, *names: str) -> list[tuple[str, object, str]]:
    """The rules for `check_rules` that these fields have allowed values."""
    return [(name, allowed.contains(getattr(config, name)), allowed.description) for name in names]


def is_local(path: Path | str | None) -> bool:
    """True if a path is on a local file system; False for a URL such as gs://bucket (a `Path` of it is gs:/bucket)."""
    return re.match(r"\w{2,}:/", str(path)) is None  # one letter is a Windows drive


class FrozenMapping(Mapping[_Key, _Value]):
    """An immutable, hashable mapping."""

    def __init__(self, entries: Mapping[_Key, _Value]) -> None:
        self._entries = dict(entries)
        self._hash = hash(frozenset(self._entries.items()))

    def __getitem__(self, key: _Key) -> _Value:
        return self._entries[key]

    def __iter__(self) -> Iterator[_Key]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"FrozenMapping({self._entries!r})"


@dataclasses.dataclass(frozen=True)
class FieldType:
    """A type of field value, with the equivalent Python and NumPy types that are accepted for it."""

    description: str  # for error messages, such as "a whole number"
    accepts: Callable[[Any], bool]  # whether a value can be converted
    # To a plain Python value: hashable, because a config is a key of compiled programs, and valid JSON.
    convert: Callable[[Any], Any]


def convert_fields(config: object, types: Mapping[str, FieldType]) -> None:
    """Converts the named fields of a frozen dataclass to plain Python values. Call it before `check_rules`.

    Raises ValueError, naming every field of another type.
    """
    check_rules(config, [(name, kind.accepts(getattr(config, name)), kind.description) for name, kind in types.items()])
    for name, kind in types.items():
        object.__setattr__(config, name, kind.convert(getattr(config, name)))


def sequence_of(kind: FieldType, description: str) -> FieldType:
    """A field that holds a sequence; it is converted to a tuple."""
    return FieldType(
        f"a sequence of {description}",
        lambda value: (
            isinstance(value, Sequence | np.ndarray) and not isinstance(value, str) and all(map(kind.accepts, value))
        ),
        lambda value: tuple(map(kind.convert, value)),
    )


def optional(kind: FieldType) -> FieldType:
    """A field that holds None or a value of the given type."""
    return FieldType(
        f"None, or {kind.description}",
        lambda value: value is None or kind.accepts(value),
        lambda value: None if value is None else kind.convert(value),
    )


def _is_finite_number(value: Any) -> bool:
    if isinstance(value, numbers.Integral):  # of hundreds of digits, math.isfinite would raise
        return _is_integer(value)
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _is_integer(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, numbers.Integral) and abs(int(value)) < _LARGEST


INTEGER = FieldType("a whole number", _is_integer, int)
NUMBER = FieldType("a finite number", _is_finite_number, float)
STRING = FieldType("a text", lambda value: isinstance(value, str), str)
BOOLEAN = FieldType("True or False", lambda value: isinstance(value, bool), bool)

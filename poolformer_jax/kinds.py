"""Kinds of values that a config's fields hold, and how a value of that kind is told from another."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from poolformer_jax.checks import refuse


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a field holds, whatever type of number or sequence it was given as.

    Args:
        name: for people.
        fits: whether a value is of this kind.
        plain: such a value in Python's own types: hashable, because a config is a key of compiled programs, and fit
            for JSON.
    """

    name: str
    fits: Callable[[Any], bool]
    plain: Callable[[Any], Any]


def fit(config: object, kinds: Mapping[str, Kind]) -> None:
    """Gives the fields of a frozen dataclass the plain values of their kinds.

    Before their range is looked at: no rule could compare a text with a number.

    Raises:
        ValueError: naming every field that holds something else.
    """
    refuse(config, [(name, kind.fits(getattr(config, name)), kind.name) for name, kind in kinds.items()])
    for name, kind in kinds.items():
        object.__setattr__(config, name, kind.plain(getattr(config, name)))


def sequence_of(kind: Kind, name: str) -> Kind:
    """Sequences of that kind, called `name` for people."""
    return Kind(
        f"a sequence of {name}",
        lambda value: (
            isinstance(value, Sequence | np.ndarray) and not isinstance(value, str) and all(map(kind.fits, value))
        ),
        lambda value: tuple(map(kind.plain, value)),
    )


def optional(kind: Kind) -> Kind:
    """That kind, or None."""
    return Kind(
        f"None, or {kind.name}",
        lambda value: value is None or kind.fits(value),
        lambda value: None if value is None else kind.plain(value),
    )


def _is_real(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, numbers.Real) and math.isfinite(value)


# Python takes True for 1, and nobody means it.
WHOLE = Kind("a whole number", lambda value: isinstance(value, numbers.Integral) and not isinstance(value, bool), int)
REAL = Kind("a finite number", _is_real, float)
TEXT = Kind("a text", lambda value: isinstance(value, str), str)
FLAG = Kind("True or False", lambda value: isinstance(value, bool), bool)

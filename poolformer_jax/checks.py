"""How a configuration refuses values it cannot work with: everything wrong at once."""

import re
import reprlib
from collections.abc import Sequence
from pathlib import Path

# A config.json may hold lists of any length; a message should not.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlist = _SHORT.maxtuple = 12


def refuse(config: object, rules: Sequence[tuple[str, object, str]]) -> None:
    """Raises one ValueError that names every field whose rule (name, whether it holds, expectation) does not hold."""
    problems = [
        f"{name}={shown(getattr(config, name))}: expected {wanted}." for name, good, wanted in rules if not good
    ]
    if problems:
        raise ValueError(f"{type(config).__name__} cannot work:\n  " + "\n  ".join(problems))


def shown(value: object) -> str:
    """A value as it is told in a message: of a long one, the beginning."""
    return _SHORT.repr(value)


def few(names: Sequence[str], count: int = 5) -> str:
    """The first names of many, and how many more there are."""
    return ", ".join(names[:count]) + (f" and {len(names) - count:,} more" if len(names) > count else "")


def is_none_or_positive(value: int | float | None) -> bool:
    """Whether a field that may be None holds a number above 0 where it is not. `value or 1` takes 0 for None."""
    return value is None or value > 0


def is_of_this_machine(path: Path | str | None) -> bool:
    """Whether a path is of the file system, and no address such as gs://bucket, which a `Path` makes to gs:/bucket."""
    return re.match(r"\w{2,}:/", str(path)) is None  # one letter is a drive of Windows

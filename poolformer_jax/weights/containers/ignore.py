"""Names of arrays to leave out, as patterns."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from poolformer_jax.errors import InputError


def names_to_read(names: Iterable[str], ignore: Sequence[str]) -> list[str]:
    """The names that none of the patterns in `ignore` matches."""
    if isinstance(ignore, str):
        raise InputError(f"ignore={ignore!r} is one text. Expected a list of patterns: ignore=[{ignore!r}].")
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in ignore)]

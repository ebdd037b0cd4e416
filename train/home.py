"""Folders below a home: shells put it in the place of a "~" that begins a word, and leave that of --run-dir=~/runs."""

from pathlib import Path
from typing import Any

from poolformer_jax.errors import InputError


def expand_home(config: Any, *names: str) -> None:
    """Puts the home in the place of "~" in these fields of a frozen config that is being made; None stays None.

    Once and here, so that everything that is told the path sees the same folder.

    Raises:
        ValueError: naming the field, if there is no such home.
    """
    for name in names:
        if not str(value := getattr(config, name)).startswith("~"):
            continue
        try:
            object.__setattr__(config, name, type(value)(Path(value).expanduser()))
        except RuntimeError as error:
            raise InputError(
                f"{name}={str(value)!r}: there is no such home on this machine. Expected another, or the whole path."
            ) from error

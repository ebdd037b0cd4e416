"""Folders from the command line: expanding "~", locking, and the error for a run folder in place of its model.

Does not import jax.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from poolformer_jax.errors import InputError
from poolformer_jax.fields import is_local


def expand_home(config: Any, *names: str) -> None:
    """Expands a leading "~" in these fields of a frozen config; call it in `__post_init__`.

    Shells expand a "~" that begins a word, but not that of `--run-dir=~/runs`. Raises InputError, naming the field, if
    this machine has no such home.
    """
    for name in names:
        if not str(value := getattr(config, name)).startswith("~"):
            continue
        try:
            object.__setattr__(config, name, type(value)(Path(value).expanduser()))
        except RuntimeError as error:
            raise InputError(
                f"{name}={str(value)!r}: this machine has no such home. Expected another name, or the full path."
            ) from error


def is_utf8(path: Path | str | None) -> bool:
    """False if the file system's bytes of a path are not UTF-8: Python has surrogates for them."""
    return not re.search("[\ud800-\udfff]", str(path))


@contextlib.contextmanager
def lock_folder(folder: Path | str, message: str) -> Iterator[None]:
    """Creates `folder` if needed and holds its lock, which the system releases even if the process is killed.

    A bucket (gs://...) has no lock: the block runs without one. Raises InputError with `message`, if another process
    holds the lock.
    """
    if not is_local(folder):
        yield
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"The folder {folder} cannot be made: {error.strerror}. Expected another one, with --run-dir (and "
            "--checkpoint-dir, if you use it)."
        ) from error
    lock = FileLock(Path(folder) / ".lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(message) from None
    try:
        yield
    finally:
        lock.release()


def refuse_run_folder(source: str) -> None:
    """Raises InputError if `source` is the folder of a run instead of the folder of its model."""
    folder = Path(source).expanduser()
    if (folder / "recipe.json").is_file() and not (folder / "config.json").is_file():
        when = "" if (folder / "model").is_dir() else ", which exists when the run has ended"
        raise InputError(f"{source} is the folder of a run. Expected that of its model: {folder / 'model'}{when}.")

"""Files that are written whole or not at all, and what a person is told when one cannot be written."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def naming_destination(destination: str | os.PathLike[str]) -> Iterator[None]:
    """Raises an OSError of the block again, with the name that the caller gave in the place of a temporary one.

    Blocks may be nested: the name of the outermost is told.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        told = OSError(f"Cannot write {os.fspath(destination)}: {reason}. Expected a place to write to, with room.")
        told.strerror = reason
        raise told from error


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, with its ending, for the block to write; it becomes `path` when the block ends.

    The folder is made if need be. Whatever happens, nothing stays by the temporary name, and a file that was there
    before stays until it is replaced.

    Raises:
        OSError: as `writing` tells it.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.{path.name}")
    with naming_destination(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON for people to read, whole or not at all.

    Raises:
        OSError: as `writing` tells it.
    """
    with replace_atomically(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

"""Writing files whole or not at all, with the destination in the message of every failure."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def naming_destination(destination: str | os.PathLike[str]) -> Iterator[None]:
    """Re-raises an OSError of the block with the destination instead of the name of a temporary file.

    In nested blocks the outermost destination is the one in the message.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        named = OSError(f"Cannot write {os.fspath(destination)}: {reason}. Expected a writable place with free space.")
        named.strerror = reason  # for an outer block
        raise named from error


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`, with the same ending. When the block ends, the file replaces `path`.

    The folder is created if needed. If the block fails, the temporary file is removed and `path` stays as it was.

    Raises:
        OSError: naming `path`, if it cannot be written.
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
    """Writes indented JSON, whole or not at all.

    Raises:
        OSError: naming `path`, if it cannot be written.
    """
    with replace_atomically(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

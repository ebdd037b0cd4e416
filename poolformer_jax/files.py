"""Reading small JSON files, and writing files whole or not at all, with the file in the message of every failure."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from poolformer_jax.errors import InputError

# The most bytes of a JSON file. In memory JSON takes up to 25 times its size. The config of a network with the classes
# of ImageNet-21k has 2 MB.
_LARGEST_JSON = 1 << 22


def read_json(path: Path, expected: str) -> dict[str, Any]:
    """The JSON object in a small file.

    Raises:
        InputError: naming the file and `expected`, if it is too large, not JSON, or not an object.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        return parse_json(file.read(_LARGEST_JSON + 1), path, expected)


def parse_json(text: str | bytes, path: Path, expected: str) -> dict[str, Any]:
    """As `read_json`, for `text` from the file `path`."""
    if len(text) > _LARGEST_JSON:
        raise InputError(f"{path} has more than {_LARGEST_JSON:,} bytes of JSON. Expected {expected}.")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}). Expected {expected}.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is a {type(value).__name__}. Expected {expected}.")
    return value


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

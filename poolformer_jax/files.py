"""Reads regular files of a limited size, and writes files whole or not at all. Every error message names the file."""

import importlib.util
import json
import os
import shutil
import stat
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from poolformer_jax.errors import InputError

fcntl: Any = importlib.import_module("fcntl") if importlib.util.find_spec("fcntl") else None  # Windows has none

_STAGING = ".poolformer-jax-"
# The most bytes of a JSON file. In memory JSON takes up to 25 times its size. The config of a network with the classes
# of ImageNet-21k has 2 MB.
LARGEST_JSON = 1 << 22


def why_unreadable(path: str | os.PathLike[str], limit: int = sys.maxsize) -> str | None:
    """Why a file must not be opened; None if it is a regular file of at most `limit` bytes.

    Opening a pipe waits for its other end, and reading a device may not end.

    Raises:
        OSError: if there is no such file.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 - called for every training image
    except ValueError:
        return "has a null character in its name, which no file has"
    if not stat.S_ISREG(status.st_mode):
        return "is not a file, but a folder, a pipe, a socket or a device"
    return f"has {status.st_size:,} bytes, more than {limit:,}" if status.st_size > limit else None


def is_file(path: Path) -> bool:
    """True for a file, False if nothing has this name.

    Raises InputError for anything else: a config that is passed over, such as a link whose target was not copied, would
    change the model without a word.
    """
    if path.is_file():
        return True
    if os.path.lexists(path):
        raise InputError(f"{path} is not a file, but a folder, a pipe, a device or a link to nothing. Expected a file.")
    return False


def files_below(folder: Path) -> Iterator[Path]:
    """Everything below `folder` but folders, however deep. Links to folders are not followed.

    Folders that cannot be read, such as lost+found, are passed over.
    """
    pending = [os.fspath(folder)]
    while pending:
        with suppress(PermissionError, FileNotFoundError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                else:
                    yield Path(entry.path)


def check_file(path: Path, limit: int, expected: str) -> None:
    """Raises InputError, naming the file and `expected`, where `why_unreadable` gives a reason."""
    if (reason := why_unreadable(path, limit)) is not None:
        raise InputError(f"{path} {reason}. Expected {expected}.")


def read_json(path: Path, expected: str) -> dict[str, Any]:
    """The JSON object in a small file.

    Raises:
        InputError: naming the file and `expected`, if it is too large, not a file, not JSON, or not an object.
        OSError: if it cannot be read.
    """
    check_file(path, LARGEST_JSON, expected)
    return parse_json(path.read_bytes(), path, expected)


def parse_json(text: str | bytes, path: Path, expected: str) -> dict[str, Any]:
    """As `read_json`, for `text` from the file `path`."""
    if len(text) > LARGEST_JSON:
        raise InputError(f"{path} has more than {LARGEST_JSON:,} bytes of JSON. Expected {expected}.")
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
        expected = "a writable place with free space"
        if isinstance(error, FileExistsError | NotADirectoryError):
            expected = "a name that no file has, in a folder"
        named = OSError(f"Cannot write {os.fspath(destination)}: {reason}. Expected {expected}.")
        named.strerror = reason  # for an outer block
        raise named from error


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Yields a temporary file name that ends like `path`. When the block ends, the file replaces `path`.

    The folder is created if needed. If the block fails, the temporary file is removed and `path` stays as it was. The
    new file is on the disk before it gets its name, and its name is there when this returns.

    Raises:
        OSError: naming `path`, if it cannot be written.
    """
    with naming_destination(path), staging_folder(path.parent) as stage:
        temporary = stage / path.name
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)


@contextmanager
def staging_folder(parent: Path, undo: Callable[[Path], None] = lambda stage: None) -> Iterator[Path]:
    """A temporary folder inside `parent`, removed when the block ends. `parent` is created if needed.

    Removes those that killed programs left, too. Each program holds a lock on its own, which ends with the program.

    Args:
        parent: on the file system of the destination, so that files can be renamed into place.
        undo: called with a folder before it is removed, to put back what is in it; also with those of killed programs.
    """
    parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(parent, undo)
    stage = parent / f"{_STAGING}{uuid.uuid4().hex}"
    stage.mkdir()
    with _locked(stage):
        try:
            yield stage
        finally:
            undo(stage)
            shutil.rmtree(stage, ignore_errors=True)


def remove_abandoned(parent: Path, undo: Callable[[Path], None] = lambda stage: None) -> None:
    """Removes the temporary folders inside `parent` that no program holds; for the arguments see `staging_folder`."""
    for path in list(parent.glob(f"{_STAGING}*")):
        with suppress(OSError), _locked(path) as is_abandoned:
            if is_abandoned and not path.is_symlink():
                undo(path)
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Holds the lock of a folder; False if another program does, or the system has no such locks."""
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except OSError:  # held elsewhere, or a file system without locks
            held = False
        yield held
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, would survive a loss of power."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON, whole or not at all.

    Raises:
        OSError: naming `path`, if it cannot be written.
    """
    with replace_atomically(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

"""One I/O error at the n-th call of the system that changes a folder: opening, renaming, making, removing, syncing."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_CHANGES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}
_active: list["Faults"] = []


class Faults:
    """Counts the calls below `folder`, and lets call `fails_at` fail; the calls are 1, 2, ..."""

    def __init__(self, folder: Path, fails_at: int) -> None:
        self._folder, self._fails_at, self.calls = str(folder), fails_at, 0

    def count(self, path: Any) -> None:
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self._folder):
            self.calls += 1
            if self.calls == self._fails_at:
                raise OSError(5, "Input/output error")

    @property
    def happened(self) -> bool:
        return self.calls >= self._fails_at


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _active and event in _CHANGES:
        _active[-1].count(arguments[0])


sys.addaudithook(_hook)
_fsync = os.fsync


def _counted_fsync(descriptor: int) -> None:
    _active[-1].count(_active[-1]._folder)
    _fsync(descriptor)


@contextmanager
def failing(folder: Path, fails_at: int) -> Iterator[Faults]:
    """Lets the call `fails_at` of the block fail."""
    faults = Faults(folder, fails_at)
    _active.append(faults)
    os.fsync = _counted_fsync
    try:
        yield faults
    finally:
        os.fsync = _fsync
        _active.remove(faults)

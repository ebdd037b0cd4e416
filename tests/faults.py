"""One I/O error at the n-th call of the system that changes a folder, and what a loss of power would drop."""

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


class Disk:
    """Which bytes of which files are on the disk: those before the last fsync of the file; names by its folder's."""

    def __init__(self, patch):
        self.synced: dict[int, bytes | list[str]] = {}
        self.renamed: list[Path] = []
        fsync, replace, rename = os.fsync, Path.replace, Path.rename

        def recorded_fsync(descriptor):
            fsync(descriptor)
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            self.synced[path.stat().st_ino] = self.content(path)

        def recorded(move):
            def recorded_move(path, target):
                if not Path(target).name.startswith((".", "old", "done")) and "old" not in Path(target).parts:
                    self.check(path)
                    self.renamed.append(Path(target))
                return move(path, target)

            return recorded_move

        patch.setattr(os, "fsync", recorded_fsync)
        patch.setattr(Path, "replace", recorded(replace))
        patch.setattr(Path, "rename", recorded(rename))

    def content(self, path):
        if path.is_file():
            return path.read_bytes()
        return sorted(inside.name for inside in path.iterdir() if not inside.name.startswith("."))

    def check(self, path):
        """Fails if a loss of power would drop a part of `path`."""
        for part in (path, *path.rglob("*")):
            assert self.synced.get(part.stat().st_ino) == self.content(part), f"{part} is not on the disk"

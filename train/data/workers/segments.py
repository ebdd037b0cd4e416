"""The shared memory in which workers pass batches: names that show its run, and freeing what killed runs left.

When all processes of a run are killed at once, Linux keeps their segments and semaphores in /dev/shm until it restarts.
So their names begin with that of a lock file, which the run holds: the lock ends with the run, however it ends.
"""

import atexit
import functools
import importlib.util
import multiprocessing.shared_memory
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

fcntl: Any = importlib.import_module("fcntl") if importlib.util.find_spec("fcntl") else None  # Windows has none
_FOLDER = Path("/dev/shm")
_NAME = re.compile(r"(?:sem\.)?(poolformer-jax-[0-9a-f]{16})(?:-\w+)?")


@functools.cache
def segment_prefix() -> str:
    """How the names of this run's segments begin; "" if the system has no such files."""
    if not _has_files():
        return ""
    prefix = f"poolformer-jax-{secrets.token_hex(8)}"
    try:
        # Locked before it has the name that others look for. The descriptor stays open.
        hidden = _FOLDER / f".{prefix}"
        fcntl.flock(os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), fcntl.LOCK_EX)
        hidden.rename(_FOLDER / prefix)
    except OSError:  # a full or read-only /dev/shm: the workers' error says more
        return ""
    atexit.register((_FOLDER / prefix).unlink, missing_ok=True)
    vars(multiprocessing.current_process())["_config"]["semprefix"] = f"/{prefix}"  # of the workers' queues
    return prefix


def free_abandoned_segments() -> None:
    """Removes the segments whose run has ended, and its lock file."""
    if not _has_files():
        return
    for path in list(_FOLDER.iterdir()):
        with suppress(OSError):  # of another user, or already removed
            if (match := _NAME.fullmatch(path.name)) and not _is_held(_FOLDER / match[1]):
                path.unlink()


def _has_files() -> bool:
    return fcntl is not None and _FOLDER.is_dir()


def _is_held(lock: Path) -> bool:
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def name_segments(prefix: str) -> None:
    """Lets the names of the segments that this process creates begin with `prefix`."""
    original: Any = multiprocessing.shared_memory.SharedMemory

    class NamedSharedMemory(original):  # type: ignore[misc]
        """As Python's, with names of ours for new segments."""

        def __init__(self, name: str | None = None, create: bool = False, size: int = 0) -> None:
            if create and name is None:
                name = f"{prefix}-{secrets.token_hex(8)}"
            super().__init__(name, create, size)

    multiprocessing.shared_memory.SharedMemory = NamedSharedMemory  # type: ignore[misc]

"""One run at a time in a folder: a lock that a killed process cannot leave behind."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

import jax

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def alone_in(folder: Path | str) -> Iterator[None]:
    """Holds the lock of `folder`, which it makes if need be; the system lets go of it when the process ends.

    Process 0 holds it for all processes of a run. There is no lock in a bucket, nor where the file system has none.

    Raises:
        ValueError: if a run that is going on holds it.
    """
    if jax.process_index() > 0 or "://" in str(folder) or fcntl is None:
        yield
        return
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    # The file stays: if it were deleted, a run that waits to open it and one that opens it anew would lock two files.
    with (place / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ValueError(
                    f"A run is going on in {folder}. Expected no other: it would lose what it is saving. Stop that "
                    "run, wait for its end, or begin this one in another folder with --run-dir (and --checkpoint-dir, "
                    "where it is given)."
                ) from None
        yield

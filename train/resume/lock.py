"""One process at a time in a folder: a lock that a killed one cannot leave behind. No jax: `prepare` imports none."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from poolformer_jax.errors import InputError
from poolformer_jax.fields import is_local

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def alone_in(folder: Path | str, refusal: str) -> Iterator[None]:
    """Holds the lock of `folder`, which it makes if need be; the system lets go of it when the process ends.

    There is no lock in a bucket, nor where the file system has none.

    Raises:
        ValueError: `refusal`, if another process holds it.
    """
    if not is_local(folder) or fcntl is None:
        yield
        return
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    # The file stays: if it were deleted, one that waits to open it and one that opens it anew would lock two files.
    with (place / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise InputError(refusal) from None
        yield

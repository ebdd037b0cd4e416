"""What a person is told when a file or folder cannot be written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def writing(destination: str | os.PathLike[str]) -> Iterator[None]:
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

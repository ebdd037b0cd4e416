"""Reads hostile files, and fails if anything runs or takes more memory than the file justifies."""

import sys
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest

from poolformer_jax.weights import WeightsFileError, open_weights

# Memory that reading may take beyond the size of the file: bookkeeping, and one pickle or header.
OVERHEAD = 8 << 20


def read_all(path):
    return {name: np.asarray(tensor) for name, tensor in open_weights(path).tensors.items()}


@contextmanager
def at_most(size):
    """Fails if the block allocates more than `size` bytes at any moment."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()


# Audit events that reading weights must not cause: importing for a pickle, starting programs, opening connections.
_FORBIDDEN = ("pickle.", "os.", "subprocess.", "shutil.", "socket.", "ctypes.")
_HARMLESS = ("os.scandir", "os.listdir")
_watching: list[list[str]] = []


def _watch(event, _):
    if _watching and event.startswith(_FORBIDDEN) and event not in _HARMLESS:
        _watching[-1].append(event)


sys.addaudithook(_watch)


@contextmanager
def nothing_runs():
    """Fails if the block causes an audit event of Python in `_FORBIDDEN`."""
    _watching.append([])
    try:
        yield
    finally:
        seen = _watching.pop()
    assert not seen


def refused(path, message):
    with (
        nothing_runs(),
        at_most(path.stat().st_size + OVERHEAD),
        pytest.raises(WeightsFileError, match=message) as error,
    ):
        read_all(path)
    assert str(path) in str(error.value)

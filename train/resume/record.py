"""The record that a checkpoint holds with its arrays: which run it belongs to, and fingerprints of its arrays.

Orbax does not notice files that change on the disk after it wrote them. The fingerprints do. They are computed on the
devices, when a state is saved and when it is restored. The shapes in the record tell a state of another network from a
damaged one.
"""

import json
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax import lax
from jaxtyping import Array, UInt32

from poolformer_jax.errors import InputError
from poolformer_jax.fields import is_local
from poolformer_jax.files import check_file
from train.compute import TrainState

Record = dict[str, Any]
COUNTERS = ("step", "skipped", "skipped_in_a_row")
_MOST_ARRAYS_LISTED = 10


def make_record(state: TrainState, run: Mapping[str, Any]) -> Record:
    """The JSON-ready record of a state of `run`."""
    record: Record = {name: int(getattr(state, name)) for name in COUNTERS}
    record |= {"run": run, "arrays": _array_types(state), "fingerprints": fingerprints(state)}
    return record | {"checksum": _checksum(record)}


def read_record(folder: epath.Path, step: int) -> Record:
    """The record of a state, without Orbax's manager, whose reading waits for all processes.

    Raises InputError if it changed since it was written, or a pipe or a device is in place of a file of the state;
    OSError if it cannot be read.
    """
    check_files(folder / str(step), "**/*")
    try:
        record = ocp.JsonCheckpointHandler().restore(folder / str(step) / "step")
    except RecursionError:  # `from None`: as a RuntimeError it would count as an error of the storage
        raise InputError("its record is nested too deeply") from None
    if not isinstance(record, dict) or record.get("checksum") != _checksum(record) or not _has_types(record):
        raise InputError("its record is not as it was written")
    if record["step"] != step:
        raise InputError(f"it says that it is of step {record['step']}")
    return record


def check_files(folder: epath.Path, pattern: str) -> None:
    """Raises InputError for a pipe or a device in place of a checkpoint's file: reading it would never end."""
    for path in Path(folder).glob(pattern) if is_local(folder) else ():
        if not path.is_dir():
            check_file(path, sys.maxsize, "a file of a checkpoint")


def changed_arrays(record: Record, abstract: TrainState) -> list[str]:
    """The arrays whose type or shape differs, as lines of a message; the first few of them."""
    saved, expected = record["arrays"], _array_types(abstract)
    lines = [
        f"{name}: {saved.get(name, 'missing')} -> {expected.get(name, 'missing')}"
        for name in {**saved, **expected}
        if saved.get(name) != expected.get(name)
    ]
    more = len(lines) - _MOST_ARRAYS_LISTED
    return lines if more <= 0 else [*lines[:_MOST_ARRAYS_LISTED], f"and {more} more"]


def check_fingerprints(record: Record, state: TrainState) -> None:
    """Raises InputError if any bit of the state differs from what was saved."""
    saved, read = record["fingerprints"], fingerprints(state)
    if changed := [name for name in read if saved.get(name) != read[name]]:
        more = f" and {len(changed) - 1} more arrays" if len(changed) > 1 else ""
        raise InputError(f"the contents of {changed[0]}{more} changed since it was written")


def fingerprints(state: TrainState) -> dict[str, int]:
    """A 32-bit fingerprint of every array, by name; the same on any mesh, and different if any single bit differs."""
    return dict(zip(_names(state), map(int, jax.device_get(_fingerprint_leaves(state)))))


def _array_types(state: TrainState) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in zip(_names(state), jax.tree.leaves(state))}


def _names(state: TrainState) -> list[str]:
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(state)]


def _has_types(record: Record) -> bool:
    """False for the record of a stranger's checkpoint that has a right checksum, but other types than ours."""
    counters = all(type(record.get(name)) is int and 0 <= record[name] < 1 << 31 for name in COUNTERS)
    return counters and all(isinstance(record.get(name), dict) for name in ("run", "arrays", "fingerprints"))


def _checksum(record: Record) -> int:
    rest = {name: value for name, value in record.items() if name != "checksum"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


@jax.jit
def _fingerprint_leaves(state: Any) -> list[UInt32[Array, ""]]:
    return [_fingerprint(array) for array in jax.tree.leaves(state)]


def _fingerprint(array: Array) -> UInt32[Array, ""]:
    """The sum of the 32-bit words, each multiplied by an odd number that depends on its position, modulo 2**32.

    Addition modulo 2**32 commutes, so the result does not depend on how the array is sharded. A changed word changes
    the sum, because multiplication by an odd number is invertible.
    """
    size = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[array.dtype.itemsize]
    words = lax.bitcast_convert_type(array, size).astype(jnp.uint32)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        position = position * np.uint32(words.shape[axis]) + lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words * (2 * position + 1), dtype=jnp.uint32)

"""Keeping a run: states on disk through Orbax, and the newest sound one back, on any mesh.

Orbax writes a state under a temporary name and renames it when it is complete, so a process that dies at any moment
leaves the states before it alone. What it does not notice is data that changed on the disk afterwards. Therefore every
state is kept with fingerprints of its arrays, computed on the devices, and compared when it is read.
"""

import contextlib
import logging
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax import lax
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt32

from train.state import TrainState

# The items of a checkpoint that are trees of arrays; the fourth item, "step", is JSON.
_TREES = ("params", "ema", "optimizer")
_COUNTERS = ("step", "skipped", "skipped_in_a_row")


class CheckpointError(Exception):
    """States could not be written, or none of those on the disk can be read."""


class Checkpoints:
    """The states of one run, by step.

    Args:
        folder: where they are, on a file system that all processes share.
        keep: number of states to keep; older ones are deleted once a newer one is complete.
    """

    def __init__(self, folder: Path | str, keep: int = 3) -> None:
        # The path of a bucket ("gs://...") is absolute, and `absolute` would take it for a local name.
        self._folder = epath.Path(folder) if "://" in str(folder) else epath.Path(folder).absolute()
        self._log = logging.getLogger(__name__)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        # What went wrong first is what a person has to know.
        with contextlib.suppress(Exception) if error is not None else contextlib.nullcontext():
            self._manager.close()

    @property
    def steps(self) -> list[int]:
        """Steps of the complete states on the disk, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, wait: bool = False) -> None:
        """Begins to write `state`, and returns when the state may be donated; with `wait`, when it is on the disk.

        A state in the middle of steps without a finite gradient is not written, so that the last one from before
        stands. Nor is one that is there already.

        Raises:
            CheckpointError: if this or the write before it failed. The states written before are untouched.
        """
        counters = {name: int(getattr(state, name)) for name in _COUNTERS}
        if counters["skipped_in_a_row"] or counters["step"] in self._manager.all_steps():
            return
        record = {**counters, "fingerprints": _fingerprints(state)}
        trees = {name: ocp.args.StandardSave(tree) for name in _TREES if (tree := getattr(state, name)) is not None}
        try:
            self._manager.save(counters["step"], args=ocp.args.Composite(**trees, step=ocp.args.JsonSave(record)))
        except Exception as error:
            raise self._failed_to_write(error) from error
        if wait:
            self.wait()

    def check(self) -> None:
        """Raises CheckpointError if a write in the background has failed."""
        try:
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed_to_write(error) from error

    def wait(self) -> None:
        """Returns when everything is on the disk, or raises CheckpointError."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed_to_write(error) from error

    def restore(self, abstract: TrainState) -> TrainState | None:
        """The newest sound state, or None if there is none at all.

        A damaged state is reported and moved to the folder `damaged`, and the one before it is taken.

        Args:
            abstract: the state's shapes, data types and shardings; any mesh, not only the one it was saved from.

        Raises:
            CheckpointError: if there are states and none of them is sound.
        """
        reasons = []
        for step in reversed(self.steps):
            try:
                state = self._read(step, abstract)
                reason = None
            except Exception as error:
                reason = _first_line(error)
            if _agree(reason is None):
                return state
            reason = reason or "another process could not read it"
            reasons.append(f"step {step}: {reason}")
            aside = self._folder / "damaged"
            self._log.warning("The checkpoint of step %d is damaged: %s. It is moved to %s.", step, reason, aside)
            self._set_aside(step)
        if reasons:
            raise CheckpointError(
                f"No checkpoint in {self._folder} can be read:\n  "
                + "\n  ".join(reasons)
                + "\nThey were moved to its folder 'damaged'. Bring back a sound one from a copy, or start the run "
                "again in a new folder with --run-dir."
            )
        return None

    def _read(self, step: int, abstract: TrainState) -> TrainState:
        wanted = {
            name: ocp.args.StandardRestore(tree) for name in _TREES if (tree := getattr(abstract, name)) is not None
        }
        found = self._manager.restore(step, args=ocp.args.Composite(**wanted, step=ocp.args.JsonRestore()))
        record = found["step"]
        counters = {
            name: jax.device_put(np.int32(record[name]), getattr(abstract, name).sharding) for name in _COUNTERS
        }
        state = abstract.replace(**{name: found[name] for name in wanted}, **counters)
        if record["step"] != step:
            raise ValueError(f"it says that it is of step {record['step']}")
        written, read = record["fingerprints"], _fingerprints(state)
        if changed := [name for name in read if written.get(name) != read[name]]:
            more = f" and {len(changed) - 1} more arrays" if len(changed) > 1 else ""
            raise ValueError(f"the contents of {changed[0]}{more} changed since it was written")
        return state

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            aside = self._folder / "damaged"
            aside.mkdir(parents=True, exist_ok=True)
            target = aside / str(step)
            if target.exists():
                target.rmtree()
            (self._folder / str(step)).rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set aside {step}")
        self._manager.reload()

    def _failed_to_write(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"A checkpoint could not be written to {self._folder}: {_first_line(error)}\n"
            "The states written before it are complete. Free space or mend the file system, then run the same command "
            "again: it goes on from the newest of them."
        )


def _agree(good: bool) -> bool:
    """Whether it went well on every process."""
    if jax.process_count() == 1:
        return good
    return bool(np.all(multihost_utils.process_allgather(np.array(good))))


def _first_line(error: BaseException) -> str:
    """The heart of an error that may carry a page of context: where it began, and what was the matter at last."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 300 else f"{lines[0][:100]} ... {lines[0][-100:]}"


def _fingerprints(state: TrainState) -> dict[str, int]:
    """A 32-bit fingerprint of every array, by name; the same on any mesh, and different if any one bit is."""
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(state)]
    return dict(zip(names, map(int, jax.device_get(_fingerprint_leaves(state)))))


@jax.jit
def _fingerprint_leaves(state: Any) -> list[UInt32[Array, ""]]:
    return [_fingerprint(array) for array in jax.tree.leaves(state)]


def _fingerprint(array: Array) -> UInt32[Array, ""]:
    """Sum of the bits as 32-bit words, each times an odd number of its place, modulo 2**32.

    Additions modulo 2**32 may be done in any order, so the result does not depend on how the array is cut up. A
    changed word changes its own term, because multiplication by an odd number can be undone.
    """
    size = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[array.dtype.itemsize]
    words = lax.bitcast_convert_type(array, size).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        place = place * np.uint32(words.shape[axis]) + lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)

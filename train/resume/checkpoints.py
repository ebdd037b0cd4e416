"""Checkpoints: states on disk through Orbax, and the newest undamaged one read back, on any mesh.

Orbax writes a state under a temporary name and renames it when it is complete (in a bucket it adds a marker). So a
process that dies at any moment leaves the states before it intact.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from poolformer_jax.errors import InputError, PoolFormerError
from poolformer_jax.fields import is_local
from train.compute import TrainState, from_process_0, processes_where
from train.resume.record import (
    COUNTERS,
    Record,
    changed_arrays,
    check_files,
    check_fingerprints,
    make_record,
    read_record,
)

_LOG = logging.getLogger(__name__)
_Result = TypeVar("_Result")
# The items of a checkpoint that are trees of arrays, if the state has them; another item, "step", is the record.
_TREES = ("params", "ema", "optimizer", "constants", "best")
_RESTORE_A_COPY = (
    "Restore an undamaged one from a copy, or start the run again in a new folder with --run-dir (and "
    "--checkpoint-dir, if you use it)."
)
# Outcomes of reading a state on one process, best first. The worst of all processes counts.
_OK, _DAMAGED, _FAILED = range(3)


class CheckpointError(PoolFormerError):
    """A state could not be written, or none on the disk can be read."""


class _DamagedError(Exception):
    """The contents of a state are not as they were written, or some process cannot read them."""


class Checkpoints:
    """The states of one run, by step.

    Args:
        folder: where they are, on a file system that all processes share.
        run: which run the states belong to, JSON-ready; saved with each of them.
        keep: number of states to keep; older ones are deleted once a newer one is complete.
        keep_every: states of multiples of this step are never deleted.
        timeout: seconds to wait until all processes see that a damaged state was moved.
    """

    def __init__(
        self,
        folder: Path | str,
        run: Mapping[str, Any],
        keep: int = 3,
        keep_every: int | None = None,
        timeout: float = 300.0,
    ) -> None:
        self._folder = _absolute(folder)
        self._run = run
        self._timeout = timeout
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every,
            # Not in a bucket, where Orbax takes every folder without its marker for a temporary one: it would delete
            # the folder `damaged`, and everything else next to the states.
            cleanup_tmp_directories=not ocp.path.step.is_path_temporary(self._folder),
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None:
            self.wait()
            self._manager.close()
            return
        with contextlib.suppress(Exception):  # the first error is the one to report
            self._manager.close()

    @property
    def steps(self) -> list[int]:
        """Steps of the states on the disk, oldest first; after `wait` all of them are complete."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, last: bool = False) -> None:
        """Starts to write `state`, and returns when it may be donated; for the `last` state, when it is on the disk.

        A state that exists is not written again. A state within a series of steps without a finite gradient is not
        written either: the step before the series may have ruined the weights, and such states would replace the good
        ones. The last state is always written, because the run would lose the steps since the state before. Raises
        CheckpointError if this write or the one before failed. The states written before are intact.
        """
        step, skipping = int(state.step), int(state.skipped_in_a_row) > 0
        if (last or not skipping) and step not in self._manager.all_steps():
            items = {name: ocp.args.StandardSave(tree) for name, tree in _trees(state).items()}
            record = ocp.args.JsonSave(make_record(state, self._run))
            with self._reporting_errors():
                self._manager.save(step, args=ocp.args.Composite(**items, step=record))
        if last:
            self.wait()

    def check(self) -> None:
        """Raises CheckpointError if a write in the background has failed."""
        with self._reporting_errors():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns when everything is on the disk, or raises CheckpointError."""
        with self._reporting_errors():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def restore(self, abstract: TrainState) -> TrainState | None:
        """The newest undamaged state, or None if the folder never had one.

        Once an older state is read, the damaged ones are reported and moved to the folder `damaged`. If all are
        damaged nothing moves, so the same command finds the same states again.

        `abstract` may be on any mesh, not only the one that the state was saved from. Raises CheckpointError if there
        are states and all are damaged, or the storage cannot be read; InputError if the states are of another network
        or optimizer than `abstract`.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps):
            try:
                state = self._read(step, abstract)
            except _DamagedError as error:
                damaged[step] = str(error)
                continue
            for number, reason in damaged.items():
                self._move_aside(number, reason)
            return state
        if damaged:
            raise _nothing_readable(self._folder, damaged)
        aside = self._folder / "damaged"
        if steps := _steps(aside):
            raise CheckpointError(
                f"{self._folder} has only damaged checkpoints, in {aside}: of step {', '.join(map(str, steps))}. "
                "The run would start again from step 0, so it stops instead. "
                f"{_RESTORE_A_COPY}"
            )
        return None

    def _read(self, step: int, abstract: TrainState) -> TrainState:
        """The state of `step`, read in parts. All processes finish a part before any starts the next one."""
        record = self._on_all_processes(step, lambda: read_record(self._folder, step))
        self._check_arrays(step, record, abstract)
        trees = self._on_all_processes(step, lambda: _read_trees(self._folder, step, abstract))
        counters = {name: jax.device_put(np.int32(record[name]), getattr(abstract, name).sharding) for name in COUNTERS}
        state = abstract.replace(**trees, **counters)
        self._on_all_processes(step, lambda: check_fingerprints(record, state))
        return state

    def _on_all_processes(self, step: int, read: Callable[[], _Result]) -> _Result:
        """Calls `read`, and returns its result if it succeeds on every process; otherwise all processes raise.

        A process that continued without the others would hang in the next collective. Raises _DamagedError if the
        state's contents are the cause; CheckpointError if anything else is.
        """
        error: Exception | None = None
        try:
            result = read()
        except Exception as raised:
            error = raised
        worst = _worst(_OK if error is None else _DAMAGED if _is_damage(error) else _FAILED)
        if worst == _OK:
            return result
        reason = "another process could not read it" if error is None else _first_line(error)
        if worst == _DAMAGED:
            raise _DamagedError(reason) from error
        if isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
            raise error
        raise CheckpointError(
            f"The checkpoint of step {step} in {self._folder} could not be read: {reason}\n"
            "It may be undamaged, so nothing was moved. Repair the storage, then run the same command again."
        ) from error

    def _check_arrays(self, step: int, record: Record, abstract: TrainState) -> None:
        if lines := changed_arrays(record, abstract):
            raise InputError(
                f"The checkpoint of step {step} in {self._folder} is of another network or optimizer:\n  "
                + "\n  ".join(lines)
                + "\nNothing was moved. Expected the network, the classes and the optimizer that it was saved with, or "
                "another folder with --run-dir (and --checkpoint-dir, if you use it)."
            )

    def _move_aside(self, step: int, reason: str) -> None:
        aside = self._folder / "damaged"
        _LOG.warning("The checkpoint of step %d is damaged: %s. It is moved to %s.", step, reason, aside)
        if jax.process_index() == 0:
            aside.mkdir(parents=True, exist_ok=True)
            target = aside / str(step)
            if target.exists():
                target.rmtree()
            (self._folder / str(step)).rename(target)
        # A process that still saw it would not save this step again, and the others would wait for it.
        wait_for_same_checkpoints(self._folder, self._timeout)
        self._manager.reload()

    @contextlib.contextmanager
    def _reporting_errors(self) -> Iterator[None]:
        """Raises a CheckpointError for any error of a write."""
        try:
            yield
        except Exception as error:
            raise CheckpointError(
                f"A checkpoint could not be written to {self._folder}: {_first_line(error)}\n"
                "The checkpoints before it are complete. Free space or repair the file system, then run the same "
                "command again: it resumes from the newest of them."
            ) from error


def saved_steps(folder: Path | str) -> list[int]:
    """Steps of the complete states in `folder`, in ascending order; none if the folder does not exist."""
    return _steps(_absolute(folder))


def newest_run(folder: Path | str) -> tuple[int, dict[str, Any]] | None:
    """The step of the newest state with a readable record, and the run it belongs to; None if there are no states.

    Reads only, and needs no device. Raises CheckpointError if there are states and no record is readable.
    """
    place = _absolute(folder)
    damaged: dict[int, str] = {}
    for step in reversed(_steps(place)):
        try:
            run: dict[str, Any] = read_record(place, step)["run"]
            if not all(isinstance(run.get(part), dict) for part in ("recipe", "network")):
                raise InputError("its record has no recipe or no network")
            return step, run
        except (ValueError, OSError) as error:
            damaged[step] = _first_line(error)
    if damaged:
        raise _nothing_readable(place, damaged)
    return None


def wait_for_same_checkpoints(folder: Path | str, seconds: float) -> None:
    """Returns when every process sees the states that process 0 sees, each in its path of the shared folder.

    A network disk may show a host what another one wrote only a minute later (NFS caches folders). Processes that
    resumed from different states would train different weights. Raises CheckpointError on every process if they still
    differ after `seconds`.
    """
    if jax.process_count() == 1:
        return
    start, warned = time.monotonic(), False
    while True:
        mine = saved_steps(folder)
        first, timed_out = from_process_0([mine, time.monotonic() - start > seconds])
        different = processes_where(mine != first)
        if not different:
            return
        if timed_out:
            break
        if not warned:
            _LOG.warning("Waiting until every process sees the checkpoints that process 0 sees in %s.", folder)
            warned = True
        time.sleep(1)
    seen, expected = (", ".join(map(str, steps)) or "none" for steps in (mine, first))
    raise CheckpointError(
        f"Processes {different} see checkpoints of other steps than process 0. Process {jax.process_index()} sees in "
        f"{folder}: {seen}; process 0 sees: {expected}. This did not change for {seconds:g} s. Expected one folder "
        "that all hosts share, given with --checkpoint-dir or --run-dir."
    )


def _nothing_readable(folder: epath.Path, damaged: Mapping[int, str]) -> CheckpointError:
    reasons = "\n  ".join(f"step {step}: {reason}" for step, reason in damaged.items())
    return CheckpointError(f"No checkpoint in {folder} can be read:\n  {reasons}\nNothing was moved. {_RESTORE_A_COPY}")


def _absolute(folder: Path | str) -> epath.Path:
    # `absolute` would take the address of a bucket ("gs://...") for a local name.
    return epath.Path(folder).absolute() if is_local(folder) else epath.Path(folder)


def _steps(folder: epath.Path) -> list[int]:
    check_files(folder, "*/_CHECKPOINT_METADATA")  # which Orbax reads in every state
    # By Orbax, because in a bucket half-written states have names like complete ones.
    return sorted(state.step for state in ocp.path.step.standard_name_format().find_all(folder))


def _trees(state: TrainState) -> dict[str, Any]:
    return {name: tree for name in _TREES if (tree := getattr(state, name)) is not None}


def _read_trees(folder: epath.Path, step: int, abstract: TrainState) -> dict[str, Any]:
    """The arrays of a state, without Orbax's manager, whose reading waits for all processes."""
    return {
        name: ocp.StandardCheckpointHandler().restore(folder / str(step) / name, args=ocp.args.StandardRestore(tree))
        for name, tree in _trees(abstract).items()
    }


def _worst(outcome: int) -> int:
    """The worst outcome of all processes."""
    if jax.process_count() == 1:
        return outcome
    return int(np.max(multihost_utils.process_allgather(np.array(outcome))))


def _is_damage(error: BaseException) -> bool:
    """True if the state's contents are the likely cause; False for errors of storage, memory and devices."""
    cause = _root_cause(error)
    return isinstance(cause, FileNotFoundError) or not isinstance(cause, OSError | MemoryError | RuntimeError)


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    """The first line of the root cause, shortened: TensorStore adds a page of context."""
    cause = _root_cause(error)
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return lines[0] if len(lines[0]) <= 300 else f"{lines[0][:100]} ... {lines[0][-100:]}"

"""Keeping a run: states on disk through Orbax, and the newest sound one back, on any mesh.

Orbax writes a state under a temporary name and renames it when it is complete, or marks it in a bucket, so a process
that dies at any moment leaves the states before it alone. What it does not notice is data that changed on the disk
afterwards. Therefore every state is kept with a record: fingerprints of its arrays, computed on the devices, and
compared when it is read; their shapes; and what run it is of, so that a state that does not fit is told from one that
is damaged.
"""

import contextlib
import json
import logging
import re
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from poolformer_jax.errors import InputError, PoolFormerError
from poolformer_jax.fields import is_local
from train.compute.distributed import from_process_0, processes_where
from train.compute.state import TrainState
from train.resume.fingerprints import array_types, fingerprints

_LOG = logging.getLogger(__name__)
_Read = TypeVar("_Read")
# The items of a checkpoint that are trees of arrays; the fourth item, "step", is JSON.
_TREES = ("params", "ema", "optimizer")
_COUNTERS = ("step", "skipped", "skipped_in_a_row")
_SHOWN = 10
_REMEDY = (
    "Bring back a sound one from a copy, or start the run again in a new folder with --run-dir (and --checkpoint-dir, "
    "where it is given)."
)
# How a state was read on a process: whole, or not because of its contents, or not because of something else.
_SOUND, _DAMAGED, _TROUBLE = range(3)
# TensorStore's words for what is wrong with a file. Any other ("PERMISSION_DENIED", "UNAVAILABLE") is about storage.
_CODES_OF_DAMAGE = ("DATA_LOSS", "NOT_FOUND", "OUT_OF_RANGE", "FAILED_PRECONDITION", "INVALID_ARGUMENT")


class CheckpointError(PoolFormerError):
    """States could not be written, or none of those on the disk can be read."""


class Checkpoints:
    """The states of one run, by step.

    Args:
        folder: where they are, on a file system that all processes share.
        run: what the states are of, JSON-ready; written with each of them.
        keep: number of states to keep; older ones are deleted once a newer one is complete.
        keep_every: states of multiples of this step are never deleted.
        patience: seconds to wait until every process sees that a damaged state was moved.
    """

    def __init__(
        self,
        folder: Path | str,
        run: Mapping[str, Any],
        keep: int = 3,
        keep_every: int | None = None,
        patience: float = 300.0,
    ) -> None:
        self._folder = _absolute(folder)
        self._run = run
        self._patience = patience
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every,
            # In a bucket a folder is taken for half written until it holds a mark, and so is this one: Orbax would
            # clear away the folder `damaged` as well, and whatever else lies here.
            cleanup_tmp_directories=not ocp.path.step.is_path_temporary(self._folder),
        )
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
        """Steps of the states on the disk, oldest first; of complete ones only after `wait`."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, last: bool = False) -> None:
        """Begins to write `state`, and returns when it may be donated; the `last` of a run, when it is on the disk.

        One that is there already, or is being written, is not written again. Nor is one amid steps without a finite
        gradient: its weights are those of the last step that had one, and that step may be what threw them away. So
        such a series does not take the place of the states from before it. The last state is written all the same:
        without it the run would lose every step since the one before.

        Raises:
            CheckpointError: if this or the write before it failed. The states written before are untouched.
        """
        counters = {name: int(getattr(state, name)) for name in _COUNTERS}
        wanted = last or not counters["skipped_in_a_row"]
        if wanted and counters["step"] not in self._manager.all_steps():
            self._begin_to_write(state, counters)
        if last:
            self.wait()

    def _begin_to_write(self, state: TrainState, counters: Mapping[str, int]) -> None:
        record: dict[str, Any] = {**counters, "run": self._run, "arrays": array_types(state)}
        record["fingerprints"] = fingerprints(state)
        record["checksum"] = _checksum(record)
        trees = {name: ocp.args.StandardSave(tree) for name in _TREES if (tree := getattr(state, name)) is not None}
        try:
            self._manager.save(counters["step"], args=ocp.args.Composite(**trees, step=ocp.args.JsonSave(record)))
        except Exception as error:
            raise self._failed_to_write(error) from error

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
        """The newest sound state, or None if there never was one.

        A damaged state is reported, and moved to the folder `damaged` once a sound one from before it is read. So
        nothing moves while there is none, and the same command finds the same states again.

        Args:
            abstract: the state's shapes, data types and shardings; any mesh, not only the one it was saved from.

        Raises:
            CheckpointError: if there are states and none of them is sound, or the storage cannot be read.
            ValueError: if the states are of another network or optimizer than `abstract`.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps):
            try:
                state = self._read(step, abstract)
            except _DamagedError as error:
                damaged[step] = str(error)
                continue
            for number, why in damaged.items():
                aside = self._folder / "damaged"
                _LOG.warning("The checkpoint of step %d is damaged: %s. It is moved to %s.", number, why, aside)
                self._set_aside(number)
            return state
        self._refuse_to_begin_again(damaged)
        return None

    def _refuse_to_begin_again(self, damaged: Mapping[int, str]) -> None:
        if damaged:
            raise _nothing_to_read(self._folder, damaged)
        aside = self._folder / "damaged"
        if steps := _steps(aside):
            raise CheckpointError(
                f"{self._folder} holds no checkpoint but those that were moved to its folder 'damaged', of step "
                f"{', '.join(map(str, steps))}. The run would begin again from step 0, and does not do so by itself. "
                f"{_REMEDY}"
            )

    def _read(self, step: int, abstract: TrainState) -> TrainState:
        """The state of `step`; in parts, each of which begins when all processes are through with the one before."""
        record = self._on_all_processes(step, lambda: _read_record(self._folder, step))
        self._refuse_other_arrays(step, record, abstract)  # the same on all processes, because the record is
        trees = self._on_all_processes(step, lambda: _read_trees(self._folder, step, abstract))
        counters = {
            name: jax.device_put(np.int32(record[name]), getattr(abstract, name).sharding) for name in _COUNTERS
        }
        state = abstract.replace(**trees, **counters)
        self._on_all_processes(step, lambda: _refuse_changed_arrays(record, state))
        return state

    def _on_all_processes(self, step: int, read: Callable[[], _Read]) -> _Read:
        """What `read` returns, if it does on every process; those that went on without the others would hang.

        Raises, on every process:
            _DamagedError: if the contents of the state are the matter.
            CheckpointError: if something else is.
        """
        error: Exception | None = None
        try:
            result = read()
        except Exception as reason:
            error = reason
        worst = _worst(_SOUND if error is None else _DAMAGED if _is_damage(error) else _TROUBLE)
        if worst == _SOUND:
            return result
        told = "another process could not read it" if error is None else _first_line(error)
        if worst == _DAMAGED:
            raise _DamagedError(told) from error
        if isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
            raise error
        raise CheckpointError(
            f"The checkpoint of step {step} in {self._folder} could not be read: {told}\n"
            "That need not be damage, so nothing was moved. Mend the storage, then run the same command again."
        ) from error

    def _refuse_other_arrays(self, step: int, record: Mapping[str, Any], abstract: TrainState) -> None:
        written, wanted = record["arrays"], array_types(abstract)
        differing = [
            f"{name}: {written.get(name, 'not there')} -> {wanted.get(name, 'not there')}"
            for name in {**written, **wanted}
            if written.get(name) != wanted.get(name)
        ]
        if differing:
            rest = [f"and {len(differing) - _SHOWN} more"] if len(differing) > _SHOWN else []
            raise InputError(
                f"The checkpoint of step {step} in {self._folder} is of another network or optimizer:\n  "
                + "\n  ".join([*differing[:_SHOWN], *rest])
                + "\nNothing was moved. Expected the network, the classes and the optimizer that it was written with, "
                "or another folder with --run-dir (and --checkpoint-dir, where it is given)."
            )

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            aside = self._folder / "damaged"
            aside.mkdir(parents=True, exist_ok=True)
            target = aside / str(step)
            if target.exists():
                target.rmtree()
            (self._folder / str(step)).rename(target)
        # A process that still saw it would not write it again when the run comes to this step, and the others would.
        wait_for_the_same_states(self._folder, self._patience)
        self._manager.reload()

    def _failed_to_write(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"A checkpoint could not be written to {self._folder}: {_first_line(error)}\n"
            "The states written before it are complete. Free space or mend the file system, then run the same command "
            "again: it goes on from the newest of them."
        )


class _DamagedError(Exception):
    """A state whose contents are not as they were written, or cannot be read so by some process."""


def saved_steps(folder: Path | str) -> list[int]:
    """Steps of the states in `folder`, first to last; none where there is no such folder."""
    return _steps(_absolute(folder))


def wait_for_the_same_states(folder: Path | str, seconds: float) -> None:
    """Returns when every process sees the states that process 0 does, each in its own path of the shared folder.

    A network disk may show a host what another one wrote a minute later: NFS keeps what it knows of a folder for so
    long. Processes that went on from different states would train different weights.

    Raises:
        CheckpointError: in every process, if that is not so within `seconds`.
    """
    if jax.process_count() == 1:
        return
    start, told = time.monotonic(), False
    while True:
        mine = saved_steps(folder)
        first, late = from_process_0([mine, time.monotonic() - start > seconds])
        unlike = processes_where(mine != first)
        if not unlike:
            return
        if late:
            break
        if not told:
            _LOG.warning("Waiting until every process sees the checkpoints that process 0 sees in %s.", folder)
            told = True
        time.sleep(1)
    found = (
        f"Process {jax.process_index()} sees checkpoints of other steps in {folder} than process 0: "
        f"{_listed(mine)}, not {_listed(first)}."
        if mine != first
        else f"Other processes see checkpoints of other steps than process 0: {unlike}."
    )
    raise CheckpointError(
        f"{found} That did not change for {seconds:g} s. Expected one folder that all hosts share, and see, "
        "given with --checkpoint-dir or --run-dir."
    )


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps)) or "none"


def newest_run(folder: Path | str) -> tuple[int, dict[str, Any]] | None:
    """The step of the newest state in `folder` that says what it is of, and what that is; None if there are none.

    Reads only, and needs no device.

    Raises:
        CheckpointError: if there are states and none of them says so.
    """
    place = _absolute(folder)
    damaged: dict[int, str] = {}
    for step in reversed(_steps(place)):
        try:
            return step, _read_record(place, step)["run"]
        except (ValueError, OSError) as error:
            damaged[step] = _first_line(error)
    if damaged:
        raise _nothing_to_read(place, damaged)
    return None


def _nothing_to_read(folder: epath.Path, damaged: Mapping[int, str]) -> CheckpointError:
    reasons = "\n  ".join(f"step {step}: {reason}" for step, reason in damaged.items())
    return CheckpointError(f"No checkpoint in {folder} can be read:\n  {reasons}\nNothing was moved. {_REMEDY}")


def _absolute(folder: Path | str) -> epath.Path:
    # The path of a bucket ("gs://...") is absolute, and `absolute` would take it for a local name.
    return epath.Path(folder).absolute() if is_local(folder) else epath.Path(folder)


def _steps(folder: epath.Path) -> list[int]:
    """Steps of the complete states in a folder; in a bucket half-written ones have names like theirs."""
    return sorted(state.step for state in ocp.path.step.standard_name_format().find_all(folder))


def _read_record(folder: epath.Path, step: int) -> dict[str, Any]:
    """The JSON beside the arrays of a state, of which not a bit has changed.

    Raises:
        ValueError: if one has, or it has no checksum that could tell.
        OSError: if it cannot be read.
    """
    # Without the manager, whose reading waits for all processes.
    record = ocp.JsonCheckpointHandler().restore(folder / str(step) / "step")
    if not isinstance(record, dict) or record.get("checksum") != _checksum(record):
        raise InputError("its record is not as it was written")
    if record["step"] != step:
        raise InputError(f"it says that it is of step {record['step']}")
    return record


def _read_trees(folder: epath.Path, step: int, abstract: TrainState) -> dict[str, Any]:
    """The arrays of a state, without the manager for the same reason."""
    return {
        name: ocp.StandardCheckpointHandler().restore(folder / str(step) / name, args=ocp.args.StandardRestore(tree))
        for name in _TREES
        if (tree := getattr(abstract, name)) is not None
    }


def _refuse_changed_arrays(record: Mapping[str, Any], state: TrainState) -> None:
    written, read = record["fingerprints"], fingerprints(state)
    if changed := [name for name in read if written.get(name) != read[name]]:
        more = f" and {len(changed) - 1} more arrays" if len(changed) > 1 else ""
        raise InputError(f"the contents of {changed[0]}{more} changed since it was written")


def _checksum(record: Mapping[str, Any]) -> int:
    rest = {name: value for name, value in record.items() if name != "checksum"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def _worst(outcome: int) -> int:
    """The worst outcome of all processes."""
    if jax.process_count() == 1:
        return outcome
    return int(np.max(multihost_utils.process_allgather(np.array(outcome))))


def _is_damage(error: BaseException) -> bool:
    """Whether the contents of a state are the matter, and not the storage, the memory or a device."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, FileNotFoundError):
        return True
    if isinstance(error, OSError | MemoryError | RuntimeError):
        return False
    code = re.match(r"([A-Z]+(?:_[A-Z]+)*): ", str(error))
    return code is None or code[1] in _CODES_OF_DAMAGE


def _first_line(error: BaseException) -> str:
    """The heart of an error that may carry a page of context: where it began, and what was the matter at last."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 300 else f"{lines[0][:100]} ... {lines[0][-100:]}"

"""What is told of a worker process that ended before its time, or could not begin.

Grain says an exit code, and the system a number. What they mean, and how to mend it, is here.
"""

import errno
import re
import signal

from poolformer_jax.errors import PoolFormerError
from train.data.workers.shared_memory import LESS_NEEDED, in_bytes, more_room, room

_AGAIN = "A run goes on from its newest checkpoint with the same command."
_HOW_MUCH = "`python -m train doctor RECIPE` says how much it needs."


class WorkerError(PoolFormerError, ChildProcessError):
    """A worker process ended before its time, or could not begin; says why, and how to mend it."""


def loss_of_a_worker(error: Exception) -> WorkerError | None:
    """The same in words for people, if it is Grain's error of a lost worker; None of other errors."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
        return WorkerError(f"A data worker cannot be started: {_full_shared_memory()}")
    found = re.search(r"Worker process was terminated unexpectedly with exit code (-?\d+)", str(error))
    return None if found is None else WorkerError(_told(int(found[1])))


def _told(code: int) -> str:
    if code >= 0:
        return f"A data worker ended with exit code {code}. Its own output, above, says why. {_AGAIN}"
    ended = f"A data worker was ended by {_name(-code)} (exit code {code})"
    if code == -signal.SIGBUS:
        return f"{ended}: {_full_shared_memory()}"
    if code == -signal.SIGKILL:
        return (
            f"{ended}, as Linux does when the memory of the host, or of the container, is used up. Expected less to be "
            "needed at a time: fewer --data.workers (in evaluate: --workers), --data.worker-batches 1, or a smaller "
            f"batch. Or give the container more memory. {_AGAIN} {_HOW_MUCH}"
        )
    return (
        f"{ended}, by a mistake in a library that reads images, or by somebody. {_AGAIN} If it happens again, "
        "--data.workers 0 (in evaluate: --workers 0) makes batches without workers, and `python -m train doctor "
        "RECIPE` looks for damaged images."
    )


def _full_shared_memory() -> str:
    there = room()
    size = "" if there is None else f" of {in_bytes(there.total)}"
    return (
        f"the shared memory{size} in /dev/shm, through which workers hand over their batches, is full. Expected more. "
        f"{more_room()} {LESS_NEEDED} {_AGAIN} {_HOW_MUCH}"
    )


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have no names
        return f"signal {number}"

"""Shared memory, in which Grain's workers hand over whole batches: how much of it they take, and what is there.

On Linux it is the file system /dev/shm, of 64 MB in containers of Docker and Kubernetes that are not given more. It
lets more be asked for than it has room for, and a process that then writes there is ended by SIGBUS.
"""

import math
import os
from pathlib import Path
from typing import NamedTuple

from poolformer_jax.errors import InputError

_FOLDER = Path("/dev/shm")  # where the C library has it

_WITHOUT = ", with which a thread of the program makes the batches, without shared memory"
LESS_NEEDED = (
    "Or need less: fewer --data.workers (in evaluate: --workers), --data.worker-batches 1, or a smaller batch; or "
    f"--data.workers 0{_WITHOUT}."
)
"""What else mends a lack of it."""


class Room(NamedTuple):
    """Bytes in shared memory."""

    total: int
    free: int


def room() -> Room | None:
    """The shared memory of this machine or container; None where it is elsewhere, or has no limit of its own."""
    if not _FOLDER.is_dir():
        return None
    there = os.statvfs(_FOLDER)
    return Room(there.f_blocks * there.f_frsize, there.f_bavail * there.f_frsize) if there.f_blocks else None


def most_batches(workers: int, worker_batches: int) -> int:
    """How many batches of so many workers are in shared memory at most, each of them keeping `worker_batches` ready.

    Of every worker there are as many on the way to the program, as many that a thread of the program has taken in, and
    one that each of the two waits to hand on. One more is the program's own, for all workers.
    """
    return workers * 2 * (worker_batches + 1) + 1 if workers else 0


def require_room(batch: int, at_once: int) -> None:
    """Refuses to hand over batches of so many bytes, up to `at_once` of them at a time, where not even one fits.

    Raises:
        ValueError: with the remedy.
    """
    there = room()
    if there is not None and batch > there.total:
        raise InputError(
            f"A batch of this process has {in_bytes(batch)}, and {_FOLDER}, through which workers hand it over, "
            f"{in_bytes(there.total)} in all. Expected room for {at_once}. {more_room(batch * at_once)} Or choose a "
            f"smaller batch, or --data.workers 0 (in evaluate: --workers 0){_WITHOUT}."
        )


def more_room(needed: float = 4 * 2**30) -> str:
    """How to give a container so many bytes of it."""
    return (
        f"Give a container more: docker run --shm-size {math.ceil(needed / 2**30)}g; in Kubernetes, mount an emptyDir "
        "with medium: Memory at /dev/shm."
    )


def in_bytes(count: float) -> str:
    """So many bytes, for people to read."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"

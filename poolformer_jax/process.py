"""The process a program runs in: Ctrl-C, standard streams, and how many cores and how much memory it may use.

Containers and cluster jobs limit cores and memory by Linux control groups, which are nested: a process is bound by its
own group and by every group around it. Machines have version 1, version 2, or both. Does not import jax.

Sources: https://docs.kernel.org/admin-guide/cgroup-v2.html and https://docs.kernel.org/admin-guide/cgroup-v1/
"""

import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import FrameType

_MOUNTED = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
# The files of a limit and of what is used, and the lines of memory.stat with what Linux takes back of that where it is
# needed: cached files, of this group and those inside.
_MEMORY = (
    ("memory.max", "memory.current", ("active_file", "inactive_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
)


@contextmanager
def exit_on_interrupt(last_words: str = "") -> Iterator[None]:
    """Lets Ctrl-C end the process with exit code 130, saying `last_words` and nothing else, until the block ends.

    For imports: there is nothing to put in order yet, and an exception gets lost in the extension modules of others, or
    becomes another one. A signal that is ignored, as by a shell's background jobs, or handled already stays so.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: FrameType | None) -> None:
        start = "\n" if sys.stderr.isatty() else ""  # where a line may say what is waited for
        end = f"{last_words}\n" if last_words else ""
        os.write(sys.stderr.fileno(), (start + end).encode())
        os._exit(128 + number)

    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt_exit_code() -> int:
    """130, the exit code of a program that caught a KeyboardInterrupt and ends."""
    return 128 + signal.SIGINT


def open_missing_streams() -> None:
    """Lets a program print, to nobody, where stdout or stderr was closed before it began (`2>&-`, some daemons).

    Python has None in their place, which most programs, libraries among them, meet for the first time in a service.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


def available_cores() -> int:
    """The cores that this process may use: fewer than the machine has, under taskset or in a container.

    A container's limit is one of time, and may be a part of a core, which is rounded up.
    """
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(there, core_limit())))


def core_limit() -> float:
    """How many cores' worth of time the process may use, as `docker --cpus` limits it; infinite without a limit."""
    return min((limit for folder in _groups("cpu") for limit in _group_core_limits(folder)), default=math.inf)


def available_memory() -> float:
    """How many bytes of memory the process may use besides those that are in use; infinite without a limit."""
    return min((left for folder in _groups("memory") for left in _memory_left(folder)), default=math.inf)


def _groups(controller: str) -> Iterator[Path]:
    """The folders of the process's own group and of those around it, where they would be; not all can be seen."""
    for line in _read(_OWN).splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers == "":  # version 2, which has all controllers in one place
            mounted = _MOUNTED
        elif controller in controllers.split(","):
            mounted = _MOUNTED / controller
        else:
            continue
        own = PurePosixPath(name.lstrip("/"))
        for group in (own, *own.parents):
            if ".." not in group.parts:  # as it is told of a group outside of what can be seen
                yield mounted / group


def _group_core_limits(folder: Path) -> Iterator[float]:
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    quota_v1, period_v1 = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    for given, every in ((quota, period), (quota_v1, period_v1)):  # microseconds in so many; "max" or -1: no limit
        if given.isdecimal() and every.isdecimal():
            yield int(given) / int(every)


def _memory_left(folder: Path) -> Iterator[float]:
    for limit, used, cached in _MEMORY:
        most, now = _read(folder / limit), _read(folder / used)
        if most.isdecimal() and now.isdecimal():
            statistics = dict(line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines())
            yield float(max(0, int(most) - int(now) + sum(int(statistics.get(name, 0)) for name in cached)))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""

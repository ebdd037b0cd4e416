"""The process that a program runs in: Ctrl-C, standard streams, error messages, and the available cores and memory.

Containers and cluster jobs limit cores and memory by Linux control groups, which are nested: the limits of a process
are those of its group and of every group around it. Machines have version 1, version 2, or both. Imports no jax.

Sources: https://docs.kernel.org/admin-guide/cgroup-v2.html and https://docs.kernel.org/admin-guide/cgroup-v1/
"""

import functools
import math
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from poolformer_jax.errors import InputError, PoolFormerError
from poolformer_jax.messages import printable_message

_COMMAND = re.compile(r"\b(python|pip|git|docker) ")
# Exit code of a program that Ctrl-C ended.
INTERRUPTED = 128 + signal.SIGINT

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_PROCESS_CGROUPS = Path("/proc/self/cgroup")
_ACCELERATORS = {"cuda": ("NVIDIA GPU", "cuda12 or cuda13"), "gpu": ("GPU", "cuda12 or cuda13"), "tpu": ("TPU", "tpu")}
# Files with the limit and the usage, and the lines of memory.stat with the cached files, which Linux frees on demand.
_MEMORY = (
    ("memory.max", "memory.current", ("active_file", "inactive_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
)


@contextmanager
def exit_on_interrupt(message: str = "") -> Iterator[None]:
    """Makes Ctrl-C exit with code 130 at once, printing only `message`, until the block ends.

    For imports: extension modules lose a KeyboardInterrupt, or turn it into another exception. Does nothing if SIGINT
    is ignored, as in a shell's background jobs, or already handled.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(*_: Any) -> None:
        start = "\n" if sys.stderr.isatty() else ""  # ends the line of `cli.arguments.waiting`
        end = f"{message}\n" if message else ""
        os.write(sys.stderr.fileno(), (start + end).encode())
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def open_missing_streams() -> None:
    """Opens /dev/null as stdout or stderr if it was closed before the program started (`2>&-`, some daemons).

    Otherwise they are None in Python, and most libraries fail when they print.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


def error_message(error: Exception) -> str | None:
    """The message to print instead of a traceback; None if this looks like a bug."""
    if isinstance(error, PoolFormerError):
        return str(error)
    if isinstance(error, OSError):
        named = str(error) if error.filename is None else f"{os.fsdecode(error.filename)}: {error.strerror}"
        return printable_message(named)
    return _missing_device(error)


def print_error(message: str) -> None:
    """Prints an error on stderr. On a terminal, lines break between words, except those with a command to copy.

    In a file or a pipe a message keeps its lines, as programs that search for it expect.
    """
    lines = f"error: {message}".split("\n")
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        wrap = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False, subsequent_indent="  ").fill
        lines = [line if _COMMAND.search(line) else wrap(line) for line in lines]
    print("\n".join(lines), file=sys.stderr)


def _missing_device(error: Exception) -> str | None:
    """The message if jax finds no device of the platforms in JAX_PLATFORMS; jax has no exception type for that."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    known = [_ACCELERATORS[name] for name in platforms.lower().split(",") if name in _ACCELERATORS]
    if not isinstance(error, AssertionError | RuntimeError) or not known:
        return None
    import jax

    try:
        jax.devices()
    except (AssertionError, RuntimeError):
        device, extra = known[0]
        return (
            f"JAX_PLATFORMS={platforms}: jax sees no {device}. Support is installed by the extra {extra}: pip install "
            f"-e '.[{extra.split()[0]}]'. Without JAX_PLATFORMS, jax uses the best device that it sees. {error}"
        ).rstrip()
    return None


@functools.cache
def process_of_jax() -> int:
    """The process in which this package first used jax's devices; processes forked from it get the same number."""
    return os.getpid()


def check_not_forked() -> None:
    """Raises InputError in a process that was forked after this package used jax's devices.

    jax has threads, which do not exist in a forked process: it would wait for them forever.
    """
    if os.getpid() != process_of_jax():
        raise InputError(
            f"jax was used in process {process_of_jax()}, and process {os.getpid()} was forked from it, where jax "
            'cannot run. Start processes with multiprocessing.get_context("spawn"), or before jax is used, and make '
            "the classifier in each of them."
        )


def available_cores() -> int:
    """The number of cores that this process may use, limited by taskset and containers. Fractions are rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, core_limit())))


def core_limit() -> float:
    """The limit on processor time in cores, as set by `docker --cpus`; infinite without a limit."""
    return min((limit for folder in _groups("cpu") for limit in _group_core_limits(folder)), default=math.inf)


def available_memory() -> float:
    """Bytes of memory that the process may still allocate under its limits; infinite without a limit."""
    return min((free for folder in _groups("memory") for free in _free_memory(folder)), default=math.inf)


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the process's group and of the groups around it. Some may not exist."""
    for line in _read(_PROCESS_CGROUPS).splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers == "":  # version 2 has all controllers in one hierarchy
            root = _CGROUP_ROOT
        elif controller in controllers.split(","):
            root = _CGROUP_ROOT / controller
        else:
            continue
        innermost = PurePosixPath(name.lstrip("/"))
        for group in (innermost, *innermost.parents):
            if ".." not in group.parts:  # the path of a group outside of this container
                yield root / group


def _group_core_limits(folder: Path) -> Iterator[float]:
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    quota_v1, period_v1 = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    for microseconds, per in ((quota, period), (quota_v1, period_v1)):  # "max" or -1 means no limit
        if microseconds.isdecimal() and per.isdecimal():
            yield int(microseconds) / int(per)


def _free_memory(folder: Path) -> Iterator[float]:
    for limit_file, usage_file, cached in _MEMORY:
        limit, usage = _read(folder / limit_file), _read(folder / usage_file)
        if limit.isdecimal() and usage.isdecimal():
            statistics = dict(line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines())
            yield float(max(0, int(limit) - int(usage) + sum(int(statistics.get(name, 0)) for name in cached)))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""

"""What a container, or a job of a cluster, may use of its machine: the limits of Linux's control groups.

Groups are nested, and a process is bound by its own group and by all around it, of which a container sees a part. Both
versions are read, because machines have one, the other, or both at the same time. Does not import jax.

Sources: https://docs.kernel.org/admin-guide/cgroup-v2.html and https://docs.kernel.org/admin-guide/cgroup-v1/
"""

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_MOUNTED = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
# The files of a limit and of what is used, and the lines of memory.stat with what Linux takes back of that where it is
# needed: cached files, of this group and those inside.
_MEMORY = (
    ("memory.max", "memory.current", ("active_file", "inactive_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
)


def cores() -> float:
    """How many cores' worth of time the process may use, as `docker --cpus` limits it; infinite without a limit."""
    return min((limit for folder in _groups("cpu") for limit in _core_limits(folder)), default=math.inf)


def memory() -> float:
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


def _core_limits(folder: Path) -> Iterator[float]:
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

"""The cores and the memory that this process may use. Imports no jax.

Containers and cluster jobs limit them by Linux control groups, which are nested: the limits of a process are those of
its group and of every group around it. Machines have version 1, version 2, or both.

Sources: https://docs.kernel.org/admin-guide/cgroup-v2.html and https://docs.kernel.org/admin-guide/cgroup-v1/
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_PROCESS_CGROUPS = Path("/proc/self/cgroup")
# Files with the limit and the usage, and the lines of memory.stat with the cached files, which Linux frees on demand.
_MEMORY = (
    ("memory.max", "memory.current", ("active_file", "inactive_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
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


def free_memory() -> float:
    """Bytes of memory that are free: those of the host, or of the process's limits if these leave fewer.

    Without /proc all memory of the host counts; infinite where Python cannot ask for it (Windows).
    """
    lines = _read(Path("/proc/meminfo")).splitlines()
    available = [float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    if not available and hasattr(os, "sysconf"):
        available = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    return min(*available, available_memory(), math.inf)


def format_bytes(count: float) -> str:
    """A number of bytes in MB or GB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


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

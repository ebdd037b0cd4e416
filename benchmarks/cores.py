"""How fast a core reads what another core has written: whether they share a cache, which a virtual machine hides."""

import os
import queue
import statistics
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_FLOATS = 100_000  # 400 kB: more than the first cache holds, less than the second
_REPEATS = 20


class Rates(NamedTuple):
    """Gigabytes a second, read and written by an elementwise operation."""

    same_core: float
    other_core: float

    @property
    def share_a_cache(self) -> bool:
        """Whether it makes little difference who has written."""
        return self.other_core > 0.7 * self.same_core


def rates() -> Rates | None:
    """Of the first two cores of this process, in some 10 ms; None with one core, or where threads cannot be pinned."""
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        return None
    first, second, *_ = sorted(os.sched_getaffinity(0))
    source, shared, sink = (np.ones(_FLOATS, np.float32) for _ in range(3))

    def write() -> float:
        np.multiply(source, 1.5, out=shared)
        return 0.0

    def read() -> float:
        start = time.perf_counter()
        np.add(shared, 1, out=sink)
        return time.perf_counter() - start

    writer, reader = _Pinned(first), _Pinned(second)
    try:
        seconds: dict[_Pinned, list[float]] = {writer: [], reader: []}
        for _ in range(_REPEATS):
            for core, found in seconds.items():
                writer.run(write)
                found.append(core.run(read))
    finally:
        writer.end()
        reader.end()
    same, other = (2 * shared.nbytes / statistics.median(found) / 1e9 for found in seconds.values())
    return Rates(same, other)


class _Pinned:
    """A thread that stays on one core."""

    def __init__(self, core: int) -> None:
        self._core = core
        self._work: queue.SimpleQueue[Callable[[], float] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[float] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        os.sched_setaffinity(0, {self._core})  # of this thread
        while (work := self._work.get()) is not None:
            self._results.put(work())

    def run(self, work: Callable[[], float]) -> float:
        self._work.put(work)
        return self._results.get()

    def end(self) -> None:
        self._work.put(None)
        self._thread.join()

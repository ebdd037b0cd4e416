"""The numbers of a run: from the metrics of single steps to one record per interval."""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

# Steps that the host may be ahead of the devices. Each of them holds a batch in device memory.
_STEPS_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class Record:
    """Means over the steps of an interval whose gradient is finite; over all steps if none is."""

    step: int  # the interval's last step
    epoch: float  # that step in epochs
    loss: float  # mean training loss in nats, on augmented images and smoothed targets
    # Share of augmented images classified as their (largest) target; for several classes per image, of right decisions;
    # NaN for regression.
    accuracy: float
    learning_rate: float  # of the last step
    gradient_norm: float  # mean global norm of the gradient
    # Over all processes, without evaluations and waits for checkpoints. The first interval includes compiling the step.
    images_per_second: float
    # Share of the time spent waiting for batches that arrived when the devices were idle. An upper bound of the
    # devices' idle time, because they may have been busy when the wait began.
    data_wait: float
    skipped: int  # steps without a finite gradient since the start of the run
    skipped_in_a_row: int  # length of the longest series of such steps that the interval saw


class Meter:
    """Collects the metrics of steps, and reports an interval once the devices have finished its last step.

    The host dispatches steps ahead of the devices. A step counts when the devices finish it, not when it is dispatched,
    so an interval measures the time of its steps, and fetching their metrics does not stall the devices.
    """

    def __init__(self, start_step: int, every: int, steps_per_epoch: int, batch_size: int) -> None:
        self._every, self._steps_per_epoch, self._batch_size = every, steps_per_epoch, batch_size
        self._step = start_step
        self._dispatched: collections.deque[Mapping[str, jax.Array]] = collections.deque()  # and perhaps unfinished
        self._done: list[Mapping[str, jax.Array]] = []  # of the current interval
        self._records: list[Record] = []
        self._waited = 0.0
        self._since = time.perf_counter()

    @property
    def step(self) -> int:
        """Steps that the devices have finished."""
        return self._step

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Wraps waiting for a batch. The wait counts if the devices have finished all steps when the batch arrives."""
        before = time.perf_counter()
        yield
        if all(map(_is_done, self._dispatched)):
            self._waited += time.perf_counter() - before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Wraps anything that is not training and must not count; call `add` with wait=True before."""
        before = time.perf_counter()
        yield
        self._since += time.perf_counter() - before

    def add(self, metrics: Mapping[str, jax.Array], wait: bool = False) -> list[Record]:
        """Takes the metrics of a step that was dispatched; returns the records of intervals that are complete.

        Args:
            metrics: of the step.
            wait: wait until the devices have finished it, as `paused` needs.
        """
        ahead = 0 if wait else _STEPS_AHEAD
        self._dispatched.append(metrics)
        until = self._step + len(self._dispatched) - ahead
        self._count(ahead)
        return self._take(until)

    def rest(self) -> list[Record]:
        """Waits for the devices, and returns the records not yet returned, even of an incomplete interval."""
        self._count(ahead=0)
        if self._done:
            self._end_interval()
        return self._take(self._step)

    def _count(self, ahead: int) -> None:
        """Moves finished steps into the interval; waits for all but the newest `ahead`."""
        while self._dispatched and (len(self._dispatched) > ahead or _is_done(self._dispatched[0])):
            self._done.append(jax.block_until_ready(self._dispatched.popleft()))
            self._step += 1
            if self._step % self._every == 0:
                self._end_interval()

    def _end_interval(self) -> None:
        now = time.perf_counter()
        self._records.append(self._record(self._step, self._done, now - self._since, self._waited))
        self._done, self._waited, self._since = [], 0.0, now

    def _take(self, until: int) -> list[Record]:
        """The records up to `until`, which all processes agree on: a divergence must end them at the same step."""
        taken = [record for record in self._records if record.step <= until]
        del self._records[: len(taken)]
        return taken

    def _record(self, step: int, metrics: list[Mapping[str, jax.Array]], seconds: float, waited: float) -> Record:
        rows = jax.device_get(metrics)
        finite = [row for row in rows if np.isfinite(row["loss"]) and np.isfinite(row["gradient_norm"])] or rows
        mean = {name: float(np.mean([row[name] for row in finite], dtype=np.float64)) for name in rows[0]}
        return Record(
            step=step,
            epoch=step / self._steps_per_epoch,
            loss=mean["loss"],
            accuracy=mean["accuracy"],
            learning_rate=float(rows[-1]["learning_rate"]),
            gradient_norm=mean["gradient_norm"],
            images_per_second=len(rows) * self._batch_size / seconds,
            data_wait=min(waited / seconds, 1.0),
            skipped=int(rows[-1]["skipped"]),
            skipped_in_a_row=max(int(row["skipped_in_a_row"]) for row in rows),
        )


def _is_done(metrics: Mapping[str, Any]) -> bool:  # Any, because jax.Array's annotations lack is_ready
    return all(value.is_ready() for value in metrics.values())

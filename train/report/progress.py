"""The progress of a run on the screen, and the numbers behind it.

`Meter` turns the metrics of single steps into one record per interval, without making the devices wait for the host.
`Display` shows records: a bar with lines below it on a terminal, plain lines in a log file.
"""

import collections
import contextlib
import dataclasses
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import jax
import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

# Steps that the host may be ahead of the devices. Each of them holds a batch in device memory.
_STEPS_AHEAD = 2
# Shown as the time left until two steps are done.
_UNKNOWN = "-:--:--"


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


def create_console() -> Console:
    """The screen, on stderr; warnings of the program are printed above a progress bar."""
    # A notebook's cell sets FORCE_COLOR, which rich takes for a terminal that can redraw a bar.
    console = Console(stderr=True, force_terminal=None if sys.stderr.isatty() else False)
    handler = RichHandler(console=console, show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    # Orbax raises the first error of its parallel writes. asyncio would log each of the others with a traceback.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    return console


class Display:
    """The run on the screen of process 0; the other processes show nothing."""

    def __init__(self, console: Console, start_step: int, total_steps: int, epochs: int) -> None:
        self._console, self._epochs, self._start, self._total = console, epochs, start_step, total_steps
        self._first: tuple[int, float] | None = None  # the first finished step, and its time
        self._train = Text("compiling the training step ...", style="dim")
        self._evaluation = Text("")
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("[progress.remaining]{task.fields[left]}[/] left"),
        )
        self._bar = Progress(*columns, console=console, expand=True)
        self._task = self._bar.add_task("", total=total_steps, completed=start_step, left=_UNKNOWN)
        group = Group(self._bar, self._train, self._evaluation)
        self._live = Live(group, console=console, refresh_per_second=4) if self._shows_bar else None

    @property
    def _shows_bar(self) -> bool:
        return self._console.is_terminal and jax.process_index() == 0

    def __enter__(self) -> "Display":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def advance(self, step: int) -> None:
        """Moves the bar to `step` steps done."""
        if self._first is None and step > self._start:
            self._first = step, time.perf_counter()  # compiling has ended
        if self._live is not None:
            self._bar.update(self._task, completed=step, left=self._time_left(step))

    def show(self, record: Record) -> None:
        """Shows the numbers of an interval."""
        accuracy = "" if np.isnan(record.accuracy) else f"accuracy {record.accuracy:6.1%}  "  # none of regression
        learning = f"loss {record.loss:.3f}  {accuracy}lr {record.learning_rate:.1e}  norm {record.gradient_norm:.3g}"
        speed = f"{record.images_per_second:,.0f} images/s  data wait {record.data_wait:.0%}"
        if record.skipped:
            speed += f"  skipped {record.skipped}"
        if self._live is not None:
            self._train.plain = f"epoch {record.epoch:.1f}/{self._epochs}  {learning}\n{speed}"
        else:
            left = f"{self._time_left(record.step)} left"
            self.say(f"step {record.step}/{self._total}  epoch {record.epoch:.1f}  {learning}  {speed}  {left}")

    def _time_left(self, step: int) -> str:
        """An estimate from all the time since this process's first step, with evaluations and checkpoints."""
        first, since = self._first or (step, 0.0)
        if step <= first:
            return _UNKNOWN
        left = round((self._total - step) * (time.perf_counter() - since) / (step - first))
        return f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"

    def show_evaluation(self, line: str) -> None:
        """Shows the result of an evaluation."""
        if self._live is not None:
            self._evaluation.plain = line
        else:
            self.say(line)

    def say(self, line: str) -> None:
        """Prints a permanent line, on process 0."""
        if jax.process_index() == 0:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

"""What a person sees while a run goes on, and the numbers behind it.

`Meter` turns the metrics of single steps into one record per interval, without making the devices wait for the host;
`Display` shows records: a bar with lines below it on a terminal, plain lines in a log file.
"""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import jax
import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

# Steps the host may be ahead of the devices. Each of them keeps a batch waiting in device memory.
_STEPS_AHEAD = 2
# The time left, while no two steps are done.
_UNKNOWN = "-:--:--"


@dataclasses.dataclass(frozen=True)
class Record:
    """Means over an interval of steps: over those with a finite gradient, unless there is none.

    Attributes:
        step: the interval's last step.
        epoch: the same in epochs.
        loss: mean training loss in nats, of the augmented images and smoothed targets.
        accuracy: share of augmented images classified as their (largest) target.
        learning_rate: of the last step.
        gradient_norm: mean of the global norm of the gradient.
        images_per_second: over all processes, without evaluations and the wait for checkpoints. The first interval's
            time includes that of compiling the step.
        data_wait: share of the time spent waiting for batches that came when the devices had nothing left to do. The
            devices waited at most so long: at the beginning of such a wait they may still have been busy.
        skipped: steps without a finite gradient, since the start of the run.
        skipped_in_a_row: the most of these without another step between them, of the series that the interval saw.
    """

    step: int
    epoch: float
    loss: float
    accuracy: float
    learning_rate: float
    gradient_norm: float
    images_per_second: float
    data_wait: float
    skipped: int
    skipped_in_a_row: int


class Meter:
    """Collects the metrics of steps, and reports an interval once the devices are done with its last step.

    The host gives the devices steps ahead of time. So a step counts when it is done and not when it is given: the clock
    of an interval is then that of its steps, and fetching their numbers stops nothing.
    """

    def __init__(self, start_step: int, every: int, steps_per_epoch: int, batch_size: int) -> None:
        self._every, self._steps_per_epoch, self._batch_size = every, steps_per_epoch, batch_size
        self._step = start_step
        self._given: collections.deque[Mapping[str, jax.Array]] = collections.deque()  # and not known to be done
        self._done: list[Mapping[str, jax.Array]] = []  # of the interval that goes on
        self._records: list[Record] = []
        self._waited = 0.0
        self._since = time.perf_counter()

    @property
    def step(self) -> int:
        """Steps that are known to be done."""
        return self._step

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for a batch; counts where the devices are done with all steps by the time it is there."""
        before = time.perf_counter()
        yield
        if all(map(_is_done, self._given)):
            self._waited += time.perf_counter() - before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around anything else that is not training, once the steps before it were waited for."""
        before = time.perf_counter()
        yield
        self._since += time.perf_counter() - before

    def add(self, metrics: Mapping[str, jax.Array], wait: bool = False) -> list[Record]:
        """Takes the metrics of a step that was given to the devices; returns the records of intervals that are over.

        Args:
            metrics: of the step.
            wait: until the devices are done with it, as is needed before the clock is paused.
        """
        ahead = 0 if wait else _STEPS_AHEAD
        self._given.append(metrics)
        until = self._step + len(self._given) - ahead
        self._count(ahead)
        return self._take(until)

    def rest(self) -> list[Record]:
        """What has not been reported yet, of however few steps; waits for the devices."""
        self._count(ahead=0)
        if self._done:
            self._end_interval()
        return self._take(self._step)

    def _count(self, ahead: int) -> None:
        """Takes the steps that are done into the interval; waits for all but the newest `ahead`."""
        while self._given and (len(self._given) > ahead or _is_done(self._given[0])):
            self._done.append(jax.block_until_ready(self._given.popleft()))
            self._step += 1
            if self._step % self._every == 0:
                self._end_interval()

    def _end_interval(self) -> None:
        now = time.perf_counter()
        self._records.append(self._record(self._step, self._done, now - self._since, self._waited))
        self._done, self._waited, self._since = [], 0.0, now

    def _take(self, until: int) -> list[Record]:
        """The records up to a step, which is the same for all processes: what follows from them has to be, too."""
        taken = [record for record in self._records if record.step <= until]
        del self._records[: len(taken)]
        return taken

    def _record(self, step: int, metrics: list[Mapping[str, jax.Array]], seconds: float, waited: float) -> Record:
        rows = jax.device_get(metrics)
        sound = [row for row in rows if np.isfinite(row["loss"]) and np.isfinite(row["gradient_norm"])] or rows
        mean = {name: float(np.mean([row[name] for row in sound], dtype=np.float64)) for name in rows[0]}
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


def _is_done(metrics: Mapping[str, Any]) -> bool:  # jax's own types do not tell of is_ready
    return all(value.is_ready() for value in metrics.values())


class Display:
    """The run on the screen of process 0; nothing on the others."""

    def __init__(self, console: Console, start_step: int, total_steps: int, epochs: int) -> None:
        self._console, self._epochs, self._start, self._total = console, epochs, start_step, total_steps
        self._first: tuple[int, float] | None = None  # step that was done first, and when
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
            self._first = step, time.perf_counter()  # compiling is over
        if self._live is not None:
            self._bar.update(self._task, completed=step, left=self._time_left(step))

    def show(self, record: Record) -> None:
        """Shows the numbers of an interval."""
        learning = (
            f"loss {record.loss:.3f}  accuracy {record.accuracy:6.1%}  lr {record.learning_rate:.1e}  "
            f"norm {record.gradient_norm:.3g}"
        )
        speed = f"{record.images_per_second:,.0f} images/s  data wait {record.data_wait:.0%}"
        if record.skipped:
            speed += f"  skipped {record.skipped}"
        if self._live is not None:
            self._train.plain = f"epoch {record.epoch:.1f}/{self._epochs}  {learning}\n{speed}"
        else:
            left = f"{self._time_left(record.step)} left"
            self.say(f"step {record.step}/{self._total}  epoch {record.epoch:.1f}  {learning}  {speed}  {left}")

    def _time_left(self, step: int) -> str:
        """From everything since this process's first step, so that evaluations and checkpoints have their share."""
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
        """Prints one line that stays, on process 0."""
        if jax.process_index() == 0:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

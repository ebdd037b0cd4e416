"""What a person sees while a run goes on, and the numbers behind it.

`Meter` turns the metrics of single steps into one record per interval, without making the devices wait for the host;
`Display` shows records: a bar with lines below it on a terminal, plain lines in a log file.
"""

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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

# Steps the host may be ahead of the devices. Each of them keeps a batch waiting in device memory.
_STEPS_AHEAD = 2


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
    """Collects the metrics of steps, and reports each interval when the next one is over.

    By then its numbers have long been computed, and fetching them stops nothing.
    """

    def __init__(self, start_step: int, every: int, steps_per_epoch: int, batch_size: int) -> None:
        self._every, self._steps_per_epoch, self._batch_size = every, steps_per_epoch, batch_size
        self._step = start_step
        self._metrics: list[Mapping[str, jax.Array]] = []
        self._last: Mapping[str, Any] = {}  # of the step that was given to the devices last
        self._complete: tuple[int, list[Mapping[str, jax.Array]], float, float] | None = None
        self._waited = 0.0
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for a batch; counts where the devices are done with all steps by the time it is there."""
        before = time.perf_counter()
        yield
        if all(value.is_ready() for value in self._last.values()):
            self._waited += time.perf_counter() - before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around anything else that is not training, once the steps before it were waited for."""
        before = time.perf_counter()
        yield
        self._since += time.perf_counter() - before

    def add(self, metrics: Mapping[str, jax.Array], wait: bool = False) -> list[Record]:
        """Takes a step's metrics; at the end of an interval, returns the record of the one before, if there is one.

        Args:
            metrics: of the step.
            wait: until the devices are done with it, as is needed before the clock is paused.
        """
        self._step += 1
        self._metrics.append(metrics)
        self._last = metrics
        ahead = 0 if wait else _STEPS_AHEAD
        if len(self._metrics) > ahead:
            jax.block_until_ready(self._metrics[-1 - ahead])
        return self._turn() if self._step % self._every == 0 else []

    def rest(self) -> list[Record]:
        """What has not been reported yet; waits for the devices."""
        return self._turn() + self._turn()

    def _turn(self) -> list[Record]:
        """Starts a new interval and returns the record of the last but one."""
        before, now = self._complete, time.perf_counter()
        self._complete = (self._step, self._metrics, now - self._since, self._waited) if self._metrics else None
        self._metrics, self._waited, self._since = [], 0.0, now
        return [] if before is None else [self._record(*before)]

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


class Display:
    """The run on the screen of process 0; nothing on the others."""

    def __init__(self, console: Console, start_step: int, total_steps: int, epochs: int, batch_size: int) -> None:
        self._console, self._epochs, self._total, self._batch_size = console, epochs, total_steps, batch_size
        self._train = Text("compiling the training step ...", style="dim")
        self._evaluation = Text("")
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        self._bar = Progress(*columns, console=console, expand=True)
        self._task = self._bar.add_task("", total=total_steps, completed=start_step)
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
        if self._live is not None:
            self._bar.update(self._task, completed=step)

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
            left = round((self._total - record.step) * self._batch_size / record.images_per_second)
            time_left = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
            self.say(f"step {record.step}/{self._total}  epoch {record.epoch:.1f}  {learning}  {speed}  {time_left}")

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

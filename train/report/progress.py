"""The progress of a run on the screen: a bar with lines below it on a terminal, plain lines in a log file."""

import logging
import sys
import time

import jax
import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from train.report.meter import Record

# Shown as the time left until two steps are done.
_UNKNOWN = "-:--:--"


def create_console() -> Console:
    """The screen, on stderr; warnings of the program are printed above a progress bar."""
    # A notebook's cell sets FORCE_COLOR, which rich takes for a terminal that can redraw a bar.
    console = Console(stderr=True, force_terminal=None if sys.stderr.isatty() else False)
    handler = RichHandler(console=console, show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    # Orbax raises the first error of its parallel writes. It also logs it (to absl), asyncio logs each of the others,
    # and TensorStore prints that nothing waits for those that end later: pages of tracebacks.
    handler.addFilter(lambda record: (record.name, record.levelno) != ("absl", logging.ERROR))
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _print_unless_of_callback
    return console


def _print_unless_of_callback(unraisable: "sys.UnraisableHookArgs") -> None:
    """A `sys.unraisablehook` without the exceptions in callbacks of C++, which belong to no Python object.

    docs/notes/tried.md has what does not work without a hook.
    """
    if unraisable.object is not None:
        sys.__unraisablehook__(unraisable)


class Display:
    """The run on the screen of process 0; the other processes show nothing."""

    def __init__(self, console: Console, start_step: int, total_steps: int, epochs: int) -> None:
        self._console, self._epochs, self._start, self._total = console, epochs, start_step, total_steps
        self._first: tuple[int, float] | None = None  # the first finished step, and its time
        self._train = Text("compiling the training step ..." if start_step < total_steps else "", style="dim")
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

    def __exit__(self, *_: object) -> None:
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
            # A terminal breaks between words; a line of a file stays whole.
            self._console.print(line, highlight=False, markup=False, soft_wrap=not self._console.is_terminal)

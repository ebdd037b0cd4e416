"""Everything a run tells, in one place: to the screen, to metrics.jsonl, to TensorBoard and to curves.png."""

import contextlib
from types import TracebackType

import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from train.compute.evaluation import Evaluation
from train.config import TrainConfig
from train.report.progress import Display, Record
from train.report.reports import Reports


class Journal:
    """The screen and the files of one run.

    Args:
        config: the run.
        console: where a person looks.
        start: the step that the run begins or goes on from.
        total: the step it ends with.
        steps_per_epoch: for the time in epochs.
    """

    def __init__(self, config: TrainConfig, console: Console, start: int, total: int, steps_per_epoch: int) -> None:
        self._steps_per_epoch = steps_per_epoch
        self._open = contextlib.ExitStack()
        self._reports = self._open.enter_context(Reports(config.run_dir, start))
        self._display = self._open.enter_context(Display(console, start, total, config.optimizer.total_epochs))
        if start >= total:
            end = "as far as --max-steps lets it go" if total == config.max_steps else "the end of its schedule"
            self._display.say(
                f"The run in {config.run_dir} is at step {start}, {end}: nothing is left to train. A new one begins in "
                "another folder, with --run-dir."
            )
        elif start:
            self._display.say(f"Going on from step {start} in {config.run_dir}.")

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What went wrong first is what a person has to know.
        with contextlib.suppress(OSError) if error is not None else contextlib.nullcontext():
            try:
                self._reports.curves()
            finally:
                self._open.close()

    def advance(self, step: int) -> None:
        """The devices are done with so many steps."""
        self._display.advance(step)

    def train(self, record: Record) -> None:
        """An interval of training is over."""
        self._reports.train(record)
        self._display.show(record)

    def lacks_evaluation(self, step: int) -> bool:
        """Whether none of `step` was noted before; the same on all processes, of which the first has the notes."""
        return bool(multihost_utils.broadcast_one_to_all(np.asarray(self._reports.lacks_evaluation(step))))

    def evaluation(self, step: int, evaluations: dict[str, Evaluation]) -> None:
        """The whole evaluation split was gone through, with each kind of weights."""
        epoch = step / self._steps_per_epoch
        for weights, evaluation in evaluations.items():
            self._reports.evaluation(step, epoch, weights, evaluation)
        self._display.show_evaluation(_one_line(evaluations, epoch))


def _one_line(evaluations: dict[str, Evaluation], epoch: float) -> str:
    params = evaluations["params"]
    line = f"held out after epoch {epoch:.1f}: top-1 {params.top1:.2%}  top-5 {params.top5:.2%}  loss {params.loss:.3f}"
    if "ema" in evaluations:
        line += f"  EMA top-1 {evaluations['ema'].top1:.2%}"
    return line

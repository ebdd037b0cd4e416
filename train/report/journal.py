"""The journal of a run: writes metrics to the screen, metrics.jsonl, TensorBoard and curves.png."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from poolformer_jax.fields import INTEGER
from poolformer_jax.files import replace_atomically, why_unreadable
from train.compute import AnyEvaluation, Evaluation
from train.config import TrainConfig
from train.report.meter import Meter, Record
from train.report.pictures import draw, paint_curves
from train.report.progress import Display
from train.report.trackers import Log, open_trackers

_LOG = logging.getLogger(__name__)
_LONGEST_LINE = 10_000  # bytes; a line has a dozen numbers
_LARGEST_FILE = 1 << 30  # bytes; a line for each of a million steps


class Journal:
    """The screen and the files of one run, and the clock of its steps."""

    def __init__(
        self,
        config: TrainConfig,
        console: Console,
        start: int,
        total: int,
        steps_per_epoch: int,
        log: Log | None = None,
    ) -> None:
        self._steps_per_epoch = steps_per_epoch
        self._meter = Meter(start, config.log_every, steps_per_epoch, config.data.batch_size)
        self.waiting_for_data = self._meter.waiting
        self.paused = self._meter.paused
        self._open = contextlib.ExitStack()
        if jax.process_index() == 0:
            log = self._open.enter_context(open_trackers(config, log))
        self._metrics = self._open.enter_context(MetricsFile(config.run_dir, start, log))
        self._display = self._open.enter_context(Display(console, start, total, config.optimizer.total_epochs))
        self.say = self._display.say
        if start >= total:
            end = "the end of --max-steps" if total == config.max_steps else "the end of its schedule"
            self._display.say(
                f"The run in {config.run_dir} is at step {start}, {end}: nothing is left to train. To start a new run, "
                "choose another folder with --run-dir."
            )
        elif start:
            self._display.say(f"Resuming from step {start} in {config.run_dir}.")

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        # The first error is the one to report.
        with contextlib.suppress(OSError) if error is not None else contextlib.nullcontext():
            try:
                self._metrics.draw_curves()
            finally:
                self._open.close()

    def step(self, metrics: Mapping[str, jax.Array], wait: bool = False) -> list[Record]:
        """Takes the metrics of a step that was dispatched; returns the intervals that are complete.

        Args:
            metrics: of the step.
            wait: wait until the devices have finished it, as `paused` needs.
        """
        return self._show(self._meter.add(metrics, wait))

    def flush(self) -> list[Record]:
        """Waits for the devices, and returns the last interval even if it is shorter."""
        return self._show(self._meter.rest())

    def has_evaluation(self, step: int) -> bool:
        """True if metrics.jsonl has an evaluation at `step`; the same on all processes."""
        return bool(multihost_utils.broadcast_one_to_all(np.asarray(self._metrics.has_evaluation(step))))

    def evaluation(self, step: int, evaluations: Mapping[str, AnyEvaluation]) -> None:
        """Reports an evaluation of the whole split, by kind of weights."""
        epoch = step / self._steps_per_epoch
        for weights, evaluation in evaluations.items():
            self._metrics.evaluation(step, epoch, weights, evaluation)
        self._display.show_evaluation(_one_line(evaluations, epoch))

    def _show(self, records: list[Record]) -> list[Record]:
        self._display.advance(self._meter.step)
        for record in records:
            self._metrics.train(record)
            self._display.show(record)
        return records


class MetricsFile:
    """metrics.jsonl and TensorBoard's event file of a run; only process 0 writes them.

    Lines of steps after `start_step` are dropped, because the run repeats these steps.

    `log` is called with the step and the figures of every line that is written.
    """

    def __init__(self, folder: Path, start_step: int, log: Log | None = None) -> None:
        self._log = log
        self._folder = folder
        self._path = folder / "metrics.jsonl"
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        kept = [line for line in _read_lines(self._path) if line["step"] <= start_step]
        with replace_atomically(self._path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._written = {(line["kind"], line["step"]) for line in kept}
        self._file = self._path.open("a")
        (folder / "tensorboard").mkdir(parents=True, exist_ok=True)
        # Not tensorboardX's SummaryWriter: its thread complains at exit if the disk is full.
        self._events = EventsWriter(str(folder / "tensorboard" / "events"), filename_suffix=f".{os.getpid()}")
        if start_step:  # TensorBoard then drops what other files have for later steps
            start = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(wall_time=time.time(), step=start_step + 1, session_log=start))

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writes:
            self._file.close()
            self._events.close()

    def train(self, record: Record) -> None:
        """Writes an interval of training."""
        self._write("train", dataclasses.asdict(record))

    def has_evaluation(self, step: int) -> bool:
        """True if an evaluation at `step` is written; only process 0 knows."""
        return self._writes and ("evaluation", step) in self._written

    def evaluation(self, step: int, epoch: float, weights: str, evaluation: AnyEvaluation) -> None:
        """Writes an evaluation of the parameters ("params") or their running mean ("ema")."""
        kind = "evaluation" if weights == "params" else f"evaluation_{weights}"
        self._write(kind, {"step": step, "epoch": epoch, **evaluation.summary()})

    def draw_curves(self) -> None:
        """Draws curves.png from everything written so far."""
        if self._writes:
            self._file.flush()
            draw(self._folder / "curves.png", paint_curves, _read_lines(self._path))

    def _write(self, kind: str, values: dict[str, Any]) -> None:
        if not self._writes or (kind, values["step"]) in self._written:  # a finished run was started again
            return
        figures = {f"{kind}/{name}": value for name, value in values.items() if name not in ("step", "epoch")}
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in figures.items()])
        try:
            self._file.write(json.dumps({"kind": kind, **finite_or_null(values)}) + "\n")
            self._file.flush()
            self._events.write_event(Event(wall_time=time.time(), step=values["step"], summary=summary))
            self._events.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._folder)) from error
        if self._log is not None:
            self._log(values["step"], figures)


def last_logged_step(folder: Path) -> int | None:
    """The last step in a run folder's metrics.jsonl; None if it has no lines."""
    return max((line["step"] for line in _read_lines(folder / "metrics.jsonl")), default=None)


def finite_or_null(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with None for NaN and infinity, which JSON does not have."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without damaged ones, such as one that a killed process left incomplete."""
    lines: list[dict[str, Any]] = []
    damaged = 0
    if not path.exists():
        return lines
    if (reason := why_unreadable(path, _LARGEST_FILE)) is not None:
        _LOG.warning("Leaves out %s: it %s.", path, reason)
        return lines
    with path.open("rb") as file:
        for text in file:
            try:
                line: Any = json.loads(text) if len(text) <= _LONGEST_LINE else None
            except (ValueError, RecursionError):
                line = None
            if _is_line(line):
                lines.append(line)
            else:
                damaged += 1
    if damaged:
        _LOG.warning("%s: leaves out damaged lines, %d of %d.", path, damaged, damaged + len(lines))
    return lines


def _is_line(line: Any) -> bool:
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str) or not INTEGER.accepts(line.get("step")):
        return False
    values = [value for name, value in line.items() if name != "kind"]
    return all(value is None or isinstance(value, int | float) for value in values)


def _one_line(evaluations: Mapping[str, AnyEvaluation], epoch: float) -> str:
    params = evaluations["params"]
    line = f"held out after epoch {epoch:.1f}: {params.headline}  loss {params.loss:.3f}"
    if (ema := evaluations.get("ema")) is not None:
        line += f"  EMA {f'top-1 {ema.top1:.2%}' if isinstance(ema, Evaluation) else ema.headline}"
    return line

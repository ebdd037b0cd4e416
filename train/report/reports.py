"""What a run leaves for people and for other programs: metrics.jsonl, TensorBoard events, pictures, results.

Only process 0 writes. Every file is either appended to by whole lines, or written under a temporary name and renamed.
"""

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from poolformer_jax.files import replace_atomically
from train.compute.evaluation import Evaluation
from train.report.progress import Record
from train.report.tensorboard import EventFile

_LOG = logging.getLogger(__name__)


class Reports:
    """The files of a run, on from the step that was restored: what was written of later steps is dropped.

    Args:
        folder: the run's folder.
        start_step: the step that the run goes on from.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        self._folder = folder
        self._path = folder / "metrics.jsonl"
        self._open = contextlib.ExitStack()
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        kept = [line for line in _lines(self._path) if line["step"] <= start_step]
        with replace_atomically(self._path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._noted = {(line["kind"], line["step"]) for line in kept}
        self._file = self._open.enter_context(self._path.open("a"))
        self._events = self._open.enter_context(contextlib.closing(EventFile(folder / "tensorboard", start_step)))

    def __enter__(self) -> "Reports":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def train(self, record: Record) -> None:
        """Notes an interval of training."""
        self._note("train", dataclasses.asdict(record))

    def lacks_evaluation(self, step: int) -> bool:
        """Whether the run that this one goes on from noted none of `step`; only process 0 knows."""
        return not self._writes or ("evaluation", step) not in self._noted

    def evaluation(self, step: int, epoch: float, weights: str, evaluation: Evaluation) -> None:
        """Notes an evaluation of the parameters ("params") or their running mean ("ema")."""
        kind = "evaluation" if weights == "params" else f"evaluation_{weights}"
        self._note(kind, {"step": step, "epoch": epoch, **evaluation.summary()})

    def curves(self) -> None:
        """Draws curves.png from everything noted so far."""
        if self._writes:
            self._file.flush()
            draw_curves(_lines(self._path), self._folder / "curves.png")

    def _note(self, kind: str, values: dict[str, Any]) -> None:
        if not self._writes or (kind, values["step"]) in self._noted:  # a finished run that is repeated
            return
        figures = {f"{kind}/{name}": value for name, value in values.items() if name not in ("step", "epoch")}
        try:
            self._file.write(json.dumps({"kind": kind, **_finite(values)}) + "\n")
            self._file.flush()
            self._events.add(values["step"], figures)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._folder)) from error


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no word for a loss that is not a number."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; one that a killed process left half written does not count."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def last_noted_step(folder: Path) -> int | None:
    """The last step that metrics.jsonl in the folder of a run has a line of; None if it has none."""
    return max((line["step"] for line in _lines(folder / "metrics.jsonl")), default=None)


def _draw(path: Path, paint: Callable[[], Any]) -> None:
    """Saves the figure that `paint` makes. A picture is never worth a run: where it fails, that is said."""
    try:
        figure = paint()
        with replace_atomically(path) as temporary:
            figure.savefig(temporary, dpi=120)
    except Exception as error:  # Matplotlib's parsers, fonts and layout raise whatever they like
        _LOG.warning("The picture %s could not be drawn, and is left out: %s: %s", path, type(error).__name__, error)


def _figure(width: float, height: float) -> Any:
    # Matplotlib takes a second to import; a run that is stopped early draws nothing.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def draw_curves(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss, accuracy and learning rate over the epochs, side by side, as a PNG."""
    _draw(path, lambda: _paint_curves(lines))


def _paint_curves(lines: Sequence[dict[str, Any]]) -> Any:
    train = [line for line in lines if line["kind"] == "train"]
    figure = _figure(12, 3.6)
    loss, accuracy, rate = figure.subplots(1, 3)
    _curve(loss, train, "loss", "training", "tab:blue")
    _curve(accuracy, train, "accuracy", "training", "tab:blue")
    for kind, name, color in (
        ("evaluation", "held out", "tab:orange"),
        ("evaluation_ema", "EMA, held out", "tab:green"),
    ):
        chosen = [line for line in lines if line["kind"] == kind]
        _curve(loss, chosen, "loss", name, color, marker="o")
        _curve(accuracy, chosen, "top1", name, color, marker="o")
    _curve(rate, train, "learning_rate", None, "tab:gray")
    for axes, title in ((loss, "Loss (nats)"), (accuracy, "Top-1 accuracy"), (rate, "Learning rate")):
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    accuracy.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    for axes in (loss, accuracy):
        if axes.has_data():
            axes.legend()
    return figure


def _curve(axes: Any, lines: Sequence[dict[str, Any]], name: str, label: str | None, color: str, **style: Any) -> None:
    if lines:
        values = [line[name] for line in lines]
        axes.plot([line["epoch"] for line in lines], values, label=label, color=color, markersize=4, **style)


def draw_confusion(evaluation: Evaluation, class_names: Sequence[str], path: Path) -> None:
    """Right class against most probable class as a PNG, rows in percent; nothing where there are too many classes."""
    if (counts := evaluation.confusion) is not None:
        _draw(path, lambda: _paint_confusion(counts, evaluation, class_names))


def _paint_confusion(counts: np.ndarray, evaluation: Evaluation, class_names: Sequence[str]) -> Any:
    # What no font has (half of a character that is not UTF-8) is spelled out, and dollars are no formulas.
    names = [name.encode(errors="backslashreplace").decode() for name in class_names]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 2.5 + 0.38 * len(names)
    figure = _figure(side + 1, side)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(names))
    axes.set_xticks(ticks, names, rotation=90 if max(map(len, names)) > 2 else 0, parse_math=False)
    axes.set_yticks(ticks, names, parse_math=False)
    axes.set_xlabel("most probable class")
    axes.set_ylabel("right class")
    axes.set_title(f"{evaluation.top1:.2%} of {evaluation.examples:,} images right")
    if len(names) <= 20:
        for row, column in np.argwhere(counts):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.8, format=lambda value, _: f"{value:.0%}")
    return figure


def evaluation_report(evaluation: Evaluation, class_names: Sequence[str]) -> dict[str, Any]:
    """An evaluation with every class's accuracy, JSON-ready."""
    classes = [
        {"class": name, "examples": int(count), "top1": int(right) / int(count) if count else None}
        for name, count, right in zip(class_names, evaluation.class_examples, evaluation.class_correct)
    ]
    return {**_finite(evaluation.summary()), "classes": classes}

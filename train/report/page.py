"""The report of an evaluation: predictions.csv, mistakes.png, confusion.png and report.html, which holds all of it."""

import base64
import csv
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from poolformer_jax.files import replace_atomically
from poolformer_jax.images import ImageError
from train.compute import Evaluation, Predictions
from train.data import ArraySource, FolderSource, Source, read_example
from train.report.analysis import confident_mistakes
from train.report.pictures import draw_confusion, draw_mistakes

_MOST_MISTAKES = 18
_PICTURES = {
    "curves.png": "Training",
    "confusion.png": "Confusion",
    "mistakes.png": "Most confident mistakes",
}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } td, th { padding: 0.2rem 0.8rem; text-align: right; }
td:first-child, th:first-child { text-align: left; } tr:nth-child(even) { background: #8882; }
img { max-width: 100%; }
"""


def write_report_files(
    folder: Path, title: str, evaluation: Evaluation, report: Mapping[str, Any], source: Source
) -> None:
    """Writes the files of one evaluation into `folder`.

    Args:
        folder: also the place of curves.png, which report.html shows if it is there.
        title: of the page.
        evaluation: with predictions.
        report: its figures, from `evaluation_report`; "classes" are the network's, by label.
        source: the split.
    """
    assert evaluation.predictions is not None
    class_names = [row["class"] for row in report["classes"]]
    draw_confusion(evaluation, class_names, folder / "confusion.png")
    draw_mistakes(*_mistakes(evaluation.predictions, source), class_names, folder / "mistakes.png")
    _write_predictions(folder / "predictions.csv", evaluation.predictions, source, class_names)
    with replace_atomically(folder / "report.html") as temporary:
        temporary.write_text(_page(folder, title, report), encoding="utf-8", errors="backslashreplace")


def _mistakes(predictions: Predictions, source: Source) -> tuple[list[Any], list[tuple[int, int, float]]]:
    """The pictures of the most confident mistakes, and (right class, answer, its probability) of each."""
    probabilities = softmax(predictions.logits.astype(np.float64), axis=1)
    pictures, answers = [], []
    for row in confident_mistakes(predictions, _MOST_MISTAKES):
        answer = int(probabilities[row].argmax())
        try:
            pictures.append(read_example(source[int(predictions.index[row])]))
        except ImageError:  # it was readable a moment ago
            continue
        answers.append((int(predictions.label[row]), answer, float(probabilities[row, answer])))
    return pictures, answers


def _write_predictions(path: Path, predictions: Predictions, source: Source, class_names: Sequence[str]) -> None:
    """A line for every image: its place in the split, its name, its class, the answer, and its probability."""
    probabilities = softmax(predictions.logits.astype(np.float64), axis=1)
    answers = probabilities.argmax(1)
    with (
        replace_atomically(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        lines = csv.writer(file)
        lines.writerow(["index", "image", "class", "prediction", "probability", "correct"])
        for row, (index, label, answer) in enumerate(zip(predictions.index, predictions.label, answers)):
            names = class_names[label], class_names[answer]
            probability = f"{probabilities[row, answer]:.6f}"
            lines.writerow([index, _name(source, int(index)), *names, probability, int(label == answer)])


def _name(source: Source, index: int) -> str:
    """The name of an image if the source knows it without reading the image; otherwise nothing."""
    if isinstance(source, FolderSource):
        return bytes(source.names[index]).decode(errors="backslashreplace")
    return source.ids[index] if isinstance(source, ArraySource) else ""


def _page(folder: Path, title: str, report: Mapping[str, Any]) -> str:
    """The page, with its pictures inside it."""
    figures = [(name, value) for name, value in report.items() if name != "classes"]
    columns = list(report["classes"][0])
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1>",
        _table(("figure", "value"), figures),
        "<p>Calibration error: how much the probability of the answer differs from how often it is right, over 15 bins."
        " With temperature: the same after dividing the logits by one number, fitted on the other half of the images."
        "</p>",
    ]
    for name, heading in _PICTURES.items():
        if (folder / name).exists():
            data = base64.b64encode((folder / name).read_bytes()).decode()
            parts.append(f'<h2>{heading}</h2><img alt="{heading}" src="data:image/png;base64,{data}">')
    rows = [[row[column] for column in columns] for row in report["classes"]]
    parts += ["<h2>Classes</h2>", _table(columns, rows), "</html>"]
    return "\n".join(parts)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [f"<tr>{''.join(f'<th>{html.escape(column)}' for column in columns)}"]
    cells += [f"<tr>{''.join(f'<td>{html.escape(_text(value))}' for value in row)}" for row in rows]
    return "<table>" + "\n".join(cells) + "</table>"


def _text(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

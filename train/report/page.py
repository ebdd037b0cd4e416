"""The report of an evaluation: predictions.csv, mistakes.png, confusion.png and report.html, which holds all of it.

For regression scatter.png replaces confusion.png; for several classes per image there is neither.
"""

import base64
import contextlib
import csv
import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit, softmax

from poolformer_jax.files import replace_atomically
from poolformer_jax.images import ImageError
from poolformer_jax.messages import csv_cell
from train.compute import AnyEvaluation, Evaluation, Predictions
from train.data import ArraySource, FolderSource, Source, read_example
from train.report.analysis import confident_mistakes, largest_errors
from train.report.pictures import draw, paint_confusion, paint_mistakes, paint_scatter, paint_sheet

_MOST_MISTAKES = 18
_PICTURES = {
    "curves.png": "Training",
    "confusion.png": "Confusion",
    "scatter.png": "Predictions by target",
    "mistakes.png": "Most confident mistakes",
}
_CALIBRATION = (
    "<p>Calibration error: how much the probability of the answer differs from how often it is right, over 15 bins. "
    "With temperature: the same after dividing the logits by one number, fitted on the other half of the images.</p>"
)
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } td, th { padding: 0.2rem 0.8rem; text-align: right; }
td:first-child, th:first-child { text-align: left; } tr:nth-child(even) { background: #8882; }
img { max-width: 100%; }
"""


def write_report_files(
    folder: Path, title: str, evaluation: AnyEvaluation, report: Mapping[str, Any], source: Source
) -> None:
    """Writes the files of one evaluation into `folder`.

    report.html shows curves.png if it is in the folder.
    """
    predictions = evaluation.predictions
    assert predictions is not None
    class_names = [row["class"] for row in report["classes"]]
    cells = list(map(csv_cell, class_names))
    mistakes = folder / "mistakes.png"
    mistakes.unlink(missing_ok=True)  # of the evaluation before
    if isinstance(evaluation, Evaluation):
        if evaluation.confusion is not None:  # None for too many classes
            draw(folder / "confusion.png", paint_confusion, evaluation.confusion, evaluation, class_names)
        pictures, wrong = _mistakes(predictions, source)
        if pictures:
            draw(mistakes, paint_mistakes, pictures, wrong, class_names)
        columns, rows = _class_predictions(predictions, cells)
    else:
        is_regression = "mse" in evaluation.figures
        answers = predictions.logits if is_regression else expit(predictions.logits)
        if is_regression:
            draw(folder / "scatter.png", paint_scatter, predictions, class_names)
        _draw_target_mistakes(answers, predictions, is_regression, class_names, source, mistakes)
        columns, rows = _target_predictions(answers, predictions, cells)
    _write_predictions(folder / "predictions.csv", predictions, source, columns, rows)
    with replace_atomically(folder / "report.html") as temporary:
        temporary.write_text(_page(folder, title, report), encoding="utf-8", errors="backslashreplace")


def _mistakes(predictions: Predictions, source: Source) -> tuple[list[Any], list[tuple[int, int, float]]]:
    """The pictures of the most confident mistakes, and (right class, answer, its probability) of each."""
    probabilities = softmax(predictions.logits.astype(np.float64), axis=1)
    rows, pictures = _pictures_of(confident_mistakes(predictions, _MOST_MISTAKES), predictions, source)
    best = probabilities.argmax(1)
    return pictures, [(int(predictions.label[r]), int(best[r]), float(probabilities[r, best[r]])) for r in rows]


def _draw_target_mistakes(
    answers: np.ndarray,
    predictions: Predictions,
    is_regression: bool,
    class_names: Sequence[str],
    source: Source,
    path: Path,
) -> None:
    """A sheet of the images with the largest errors, each with its worst class or number."""
    scale = predictions.label.std(0) if is_regression else np.ones(len(class_names))
    column_of = largest_errors(answers, predictions.label, scale, _MOST_MISTAKES, 0.0 if is_regression else 0.5)
    rows, pictures = _pictures_of(column_of, predictions, source)
    captions = []
    for row in rows:
        answer, right = answers[row, column_of[row]], predictions.label[row, column_of[row]]
        texts = (
            (f"{answer:.3g}", f"{right:.3g}") if is_regression else (f"{answer:.0%}", "present" if right else "absent")
        )
        captions.append([(class_names[column_of[row]], texts[0]), ("target", texts[1])])
    if pictures:
        draw(path, paint_sheet, pictures, captions)


def _pictures_of(rows: Iterable[int], predictions: Predictions, source: Source) -> tuple[list[int], list[Any]]:
    """The rows whose images can still be read, and their pictures."""
    pictures: dict[int, Any] = {}
    for row in rows:
        with contextlib.suppress(ImageError):  # it was readable a moment ago
            pictures[int(row)] = read_example(source[int(predictions.index[row])])
    return list(pictures), list(pictures.values())


_Rows = Iterator[Sequence[Any]]


def _class_predictions(predictions: Predictions, class_names: Sequence[str]) -> tuple[Sequence[str], _Rows]:
    """The class of every image, the answer, and its probability."""
    probabilities = softmax(predictions.logits.astype(np.float64), axis=1)
    rows = (
        (class_names[label], class_names[row.argmax()], f"{row.max():.6f}", int(label == row.argmax()))
        for label, row in zip(predictions.label, probabilities)
    )
    return ("class", "prediction", "probability", "correct"), rows


def _target_predictions(
    answers: np.ndarray, predictions: Predictions, class_names: Sequence[str]
) -> tuple[Sequence[str], _Rows]:
    """For every class or number, what is right, and the answer: a probability, or a number."""
    columns = [column for name in class_names for column in (name, f"{name} prediction")]
    pairs = np.stack([predictions.label, answers], axis=2).reshape(len(answers), -1)
    return columns, ([f"{value:.6g}" for value in row] for row in pairs)


def _write_predictions(
    path: Path, predictions: Predictions, source: Source, columns: Sequence[str], rows: _Rows
) -> None:
    """A line for every image: its place in the split, its name, and a row of `rows`."""
    with (
        replace_atomically(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        lines = csv.writer(file)
        lines.writerow(["index", "image", *columns])
        lines.writerows([index, _name(source, int(index)), *row] for index, row in zip(predictions.index, rows))


def _name(source: Source, index: int) -> str:
    """The name of an image if the source knows it without reading the image; otherwise nothing."""
    if isinstance(source, FolderSource):
        return csv_cell(bytes(source.names[index]))
    return csv_cell(source.ids[index]) if isinstance(source, ArraySource) else ""


def _page(folder: Path, title: str, report: Mapping[str, Any]) -> str:
    """The page, with its pictures inside it."""
    figures = [(name.replace("_", " "), value) for name, value in report.items() if name != "classes"]
    columns = list(report["classes"][0])
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1>",
        _table(("figure", "value"), figures),
    ]
    if "calibration_error" in report:
        parts.append(_CALIBRATION)
    is_regression = "mse" in report
    pictures = _PICTURES | ({"mistakes.png": "Largest errors"} if is_regression else {})
    for name, heading in pictures.items():
        if (folder / name).exists():
            data = base64.b64encode((folder / name).read_bytes()).decode()
            parts.append(f'<h2>{heading}</h2><img alt="{heading}" src="data:image/png;base64,{data}">')
    rows = [[row[column] for column in columns] for row in report["classes"]]
    columns = [column.replace("_", " ") for column in columns]
    parts += [f"<h2>{'Numbers' if is_regression else 'Classes'}</h2>", _table(columns, rows), "</html>"]
    return "\n".join(parts)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [f"<tr>{''.join(f'<th>{html.escape(column)}' for column in columns)}"]
    cells += [f"<tr>{''.join(f'<td>{html.escape(_text(value))}' for value in row)}" for row in rows]
    return "<table>" + "\n".join(cells) + "</table>"


def _text(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

"""The pictures of a run: curves.png, confusion.png or scatter.png, and mistakes.png."""

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec
from unicodedata import east_asian_width

import numpy as np

from poolformer_jax.files import replace_atomically
from train.compute import Evaluation, Predictions

P = ParamSpec("P")
_LOG = logging.getLogger(__name__)
# Width of a class name above a picture of an inch and a half, in characters; those of East Asia count twice.
_LONGEST_NAME = 18
_MOST_PLOTS = 12
# The figure of an evaluation that curves.png shows: the first that the run has.
_MAIN_FIGURES = {"top1": "Top-1 accuracy", "map": "Mean average precision", "r2": "R²"}


def draw(path: Path, paint: Callable[P, Any], *args: P.args, **kwargs: P.kwargs) -> None:
    """Saves the figure that a painter below makes, as a PNG. Errors are logged, because they must not end a run."""
    try:
        figure = paint(*args, **kwargs)
        with replace_atomically(path) as temporary:
            figure.savefig(temporary, dpi=120)
    except Exception as error:  # Matplotlib raises errors of many types
        _LOG.warning("The picture %s could not be drawn and is left out: %s: %s", path, type(error).__name__, error)


def _figure(width: float, height: float) -> Any:
    # Imported late, because it takes a second.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def paint_curves(lines: Sequence[dict[str, Any]]) -> Any:
    """Loss, the main held-out figure and learning rate over the epochs, side by side."""
    from matplotlib.ticker import PercentFormatter

    train = [line for line in lines if line["kind"] == "train"]
    figure = _figure(12, 3.6)
    loss, middle, rate = figure.subplots(1, 3)
    main = next((name for name in _MAIN_FIGURES if any(name in line for line in lines)), "top1")
    _curve(loss, train, "loss", "training, augmented", "tab:blue")
    if main == "top1":
        _curve(middle, train, "accuracy", "training, augmented", "tab:blue")
    for kind, name, color in (
        ("evaluation", "held out", "tab:orange"),
        ("evaluation_ema", "EMA, held out", "tab:green"),
    ):
        chosen = [line for line in lines if line["kind"] == kind]
        _curve(loss, chosen, "loss", name, color, marker="o")
        _curve(middle, chosen, main, name, color, marker="o")
    _curve(rate, train, "learning_rate", None, "tab:gray")
    titles = ("Loss" if main == "r2" else "Loss (nats)", _MAIN_FIGURES[main], "Learning rate")
    for axes, title in zip((loss, middle, rate), titles):
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    if main != "r2":
        middle.yaxis.set_major_formatter(PercentFormatter(1))  # as many decimals as the ticks need to differ
    for axes in (loss, middle):
        if axes.has_data():
            axes.legend()
    return figure


def _curve(axes: Any, lines: Sequence[dict[str, Any]], name: str, label: str | None, color: str, **style: Any) -> None:
    if lines:
        values = [line.get(name) for line in lines]  # a damaged line may lack it
        style.setdefault("marker", "o" if len(lines) == 1 else None)  # a line of one point is invisible
        axes.plot([line.get("epoch") for line in lines], values, label=label, color=color, markersize=4, **style)


def paint_scatter(predictions: Predictions, names: Sequence[str]) -> Any:
    """The predictions of a regression by their targets, one plot for each of the first dozen numbers."""
    names = names[:_MOST_PLOTS]
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    texts, style = _labels(dict(enumerate(map(_short, names))))
    figure = _figure(3 * columns, 3 * rows)
    for column, text in texts.items():
        axes = figure.add_subplot(rows, columns, column + 1)
        right, answers = predictions.label[:, column], predictions.logits[:, column]
        axes.axline((right.mean(), right.mean()), slope=1, color="tab:gray", linewidth=1)
        axes.scatter(right, answers, s=8, alpha=min(1, max(0.1, 300 / len(right))), linewidths=0, rasterized=True)
        axes.set_title(text, **style)
        axes.set(xlabel="target", ylabel="prediction")
        axes.grid(alpha=0.3)
    return figure


def paint_sheet(pictures: Sequence[Any], captions: Sequence[Sequence[tuple[str, str]]]) -> Any:
    """Pictures with captions as a sheet.

    Args:
        pictures: Pillow images, or uint8 [h, w, c].
        captions: of each picture up to two lines, each a class's name and its value.
    """
    lines = ["\n".join(f"{_short(name)}: {value}" for name, value in caption) for caption in captions]
    return _sheet(pictures, lines, _labels(dict(enumerate(lines)))[1])


def paint_mistakes(
    pictures: Sequence[Any], answers: Sequence[tuple[int, int, float]], class_names: Sequence[str]
) -> Any:
    """Wrong answers as a sheet of Pillow images; `answers` are of each the right class, the answer, its probability."""
    labels = {label for right, answer, _ in answers for label in (right, answer)}
    names, style = _labels({label: _short(class_names[label]) for label in labels})
    captions = [f"{names[answer]}: {probability:.0%}\ntarget: {names[right]}" for right, answer, probability in answers]
    return _sheet(pictures, captions, style)


def _sheet(pictures: Sequence[Any], captions: Sequence[str], style: Mapping[str, Any]) -> Any:
    columns = min(6, len(pictures))
    rows = -(-len(pictures) // columns)
    figure = _figure(1.5 * columns, 1.875 * rows)
    axes = figure.subplots()  # one for all pictures, because axes take long to draw
    for place, (picture, text) in enumerate(zip(pictures, captions)):
        left, top = place % columns, 1.25 * (place // columns)
        edges = (left + 0.04, left + 0.96, top + 1.21, top + 0.29)
        axes.imshow(np.asarray(picture), cmap="gray", vmin=0, vmax=255, extent=edges)
        axes.text(left + 0.5, top + 0.27, text, ha="center", fontsize=7, clip_on=True, **style)
    axes.set(xlim=(0, columns), ylim=(1.25 * rows, 0), aspect="equal")
    axes.set_axis_off()
    return figure


def _short(name: str) -> str:
    """The name, drawable, and cut at the width of a picture."""
    text = _drawable(name)
    widths = itertools.accumulate(2 if east_asian_width(character) in "WF" else 1 for character in text)
    fitting = sum(width <= _LONGEST_NAME for width in widths)
    return text if fitting == len(text) else f"{text[: fitting - 1]}…"


def _drawable(name: str) -> str:
    """The name without bytes that are not UTF-8, which have no glyph."""
    return name.encode(errors="backslashreplace").decode()


def paint_confusion(counts: np.ndarray, evaluation: Evaluation, class_names: Sequence[str]) -> Any:
    """The confusion matrix `counts`, colours by share of each row."""
    drawable = dict(enumerate(map(_drawable, class_names)))
    labels, style = _labels(drawable)
    names, order = list(labels.values()), "" if labels == drawable else " (number: its order in evaluation.json)"
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 2.5 + 0.38 * len(names)
    figure = _figure(side + 1, side)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(names))
    axes.set_xticks(ticks, names, rotation=90 if max(map(len, names)) > 2 else 0, **style)
    axes.set_yticks(ticks, names, **style)
    axes.set_xlabel(f"predicted class{order}")
    axes.set_ylabel("true class")
    axes.set_title(f"Top-1 accuracy {evaluation.top1:.2%} ({evaluation.examples:,} images)")
    if len(names) <= 20:
        for row, column in np.argwhere(counts):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.8, format=lambda value, _: f"{value:.0%}")
    return figure


def _labels(names: Mapping[int, str]) -> tuple[Mapping[int, str], dict[str, Any]]:
    """The names and the style of text that draws them; their numbers if no installed font has every character."""
    style: dict[str, Any] = {"parse_math": False}  # otherwise a dollar sign starts a formula
    if (fonts := _fonts_for("".join(names.values()))) is None:
        return {number: str(number) for number in names}, style
    return names, style | ({"family": fonts} if fonts else {})


def _fonts_for(text: str) -> list[str] | None:
    """Families that have every character of the text: none for the default font; None if no installed font has all."""
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    default = FT2Font(font_manager.findfont("DejaVu Sans")).get_charmap()
    if not (missing := {ord(character) for character in text if character.isprintable()} - default.keys()):
        return []
    # Most fonts for Chinese, Japanese and Korean have CJK in their name, so try them first.
    for font in sorted(font_manager.fontManager.ttflist, key=lambda font: ("CJK" not in font.name, font.name)):
        if font.name.startswith("Last Resort"):  # Matplotlib's, which draws every character as a box
            continue
        try:
            if missing <= FT2Font(font.fname).get_charmap().keys():
                return ["DejaVu Sans", font.name]
        except (OSError, RuntimeError):  # removed since Matplotlib listed it, or damaged
            continue
    return None

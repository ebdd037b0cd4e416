"""Evaluation where an image has several classes, or numbers: from the outputs for the whole split, on the host."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from poolformer_jax.network import ProblemType
from train.compute.predictions import Predictions


@dataclasses.dataclass(frozen=True)
class TargetEvaluation:
    """Results over a split."""

    examples: int  # number of examples counted
    loss: float  # mean binary cross entropy in nats, without smoothing; for regression the mean squared error
    # For several classes per image `map`, the mean average precision of the classes that an image has, and `f1`, the
    # mean F1 of the classes that an image has or that are predicted with a probability above 0.5; for regression `mse`,
    # `rmse`, `mae` and `r2`, the mean R² of the numbers that vary. All are scikit-learn's.
    figures: dict[str, float]
    # The figures of every class, or of every number that is regressed; None where they are not defined.
    targets: Sequence[dict[str, Any]]
    predictions: Predictions  # the outputs for every example

    def summary(self) -> dict[str, float]:
        """The figures of the whole split, without those of each class."""
        return {"examples": self.examples, "loss": self.loss, **self.figures}

    @property
    def headline(self) -> str:
        """The figures in words."""
        if "map" in self.figures:
            return f"mAP {self.figures['map']:.2%}  F1 {self.figures['f1']:.2%}"
        return f"mean absolute error {self.figures['mae']:.4g}  R² {self.figures['r2']:.4g}"


def evaluate_targets(problem: ProblemType, predictions: Predictions) -> TargetEvaluation:
    """The figures of a network's outputs, computed in float64.

    Args:
        problem: "multi_label_classification" or "regression".
        predictions: with 0 or 1 for each class, or numbers, as labels.
    """
    outputs, targets = predictions.logits.astype(np.float64), predictions.label.astype(np.float64)
    if problem == "regression":
        rows = _errors(outputs, targets)
        loss = float(np.square(outputs - targets).mean())
        figures = {"mse": loss, "rmse": loss**0.5, "mae": _mean(rows, "mae"), "r2": _mean(rows, "r2")}
    else:
        rows = _class_scores(outputs, np.greater(targets, 0.5))
        loss = float(np.mean(np.logaddexp(0, outputs) - targets * outputs))
        figures = {"map": _mean(rows, "average_precision"), "f1": _mean(rows, "f1")}
    return TargetEvaluation(len(outputs), loss, figures, rows, predictions)


def _errors(outputs: Float[np.ndarray, "n k"], targets: Float[np.ndarray, "n k"]) -> list[dict[str, Any]]:
    squared, variance = np.square(outputs - targets).mean(0), targets.var(0)
    absolute = np.abs(outputs - targets).mean(0)
    return [
        {"mse": mse, "rmse": mse**0.5, "mae": mae, "r2": 1 - mse / spread if spread else None}
        for mse, mae, spread in zip(squared.tolist(), absolute.tolist(), variance.tolist())
    ]


def _class_scores(outputs: Float[np.ndarray, "n k"], positive: Bool[np.ndarray, "n k"]) -> list[dict[str, Any]]:
    from sklearn.metrics import average_precision_score  # a second to import

    found = outputs > 0
    right, there, answered = (counts.sum(0) for counts in (found & positive, positive, found))
    scores = {
        "average_precision": [
            average_precision_score(mine, scores) if mine.any() else None for mine, scores in zip(positive.T, outputs.T)
        ],
        "precision": _ratios(right, answered),
        "recall": _ratios(right, there),
        "f1": _ratios(2 * right, there + answered),
    }
    return [
        {"examples": int(count), **{name: values[column] for name, values in scores.items()}}
        for column, count in enumerate(there)
    ]


def _ratios(counts: np.ndarray, totals: np.ndarray) -> list[float | None]:
    """counts / totals; None where the total is 0."""
    return [count / total if total else None for count, total in zip(counts.tolist(), totals.tolist())]


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    """The mean over the rows that have the figure; NaN if none has."""
    known = [row[name] for row in rows if row[name] is not None]
    return float(np.mean(known)) if known else float("nan")

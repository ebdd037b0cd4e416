"""Evaluation where an image has several classes, or numbers: from the outputs for the whole split, on the host."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from train.data import ProblemType


@dataclasses.dataclass(frozen=True)
class TargetEvaluation:
    """Results over a split.

    Attributes:
        examples: number of examples counted.
        loss: mean binary cross entropy in nats, without smoothing; for regression the mean squared error.
        figures: for several classes per image `map`, the mean average precision of the classes that an image has, as
            scikit-learn's `average_precision_score`; for regression `mse` and `mae`, the mean absolute error.
        targets: the figures of every class, or of every number that is regressed.
    """

    examples: int
    loss: float
    figures: dict[str, float]
    targets: Sequence[dict[str, Any]]

    def summary(self) -> dict[str, float]:
        """The figures without those of single classes."""
        return {"examples": self.examples, "loss": self.loss, **self.figures}

    @property
    def headline(self) -> str:
        """The figures in words."""
        if "map" in self.figures:
            return f"mAP {self.figures['map']:.2%}"
        return f"mean squared error {self.figures['mse']:.4g}  mean absolute error {self.figures['mae']:.4g}"


def evaluate_targets(
    problem: ProblemType, outputs: Float[np.ndarray, "n k"], targets: Float[np.ndarray, "n k"]
) -> TargetEvaluation:
    """The figures of a network's outputs, computed in float64.

    Args:
        problem: "multi_label_classification" or "regression".
        outputs: logits, or the numbers that the network gives.
        targets: 0 or 1 for each class, or numbers.
    """
    outputs, targets = outputs.astype(np.float64), targets.astype(np.float64)
    if problem == "regression":
        squared, absolute = np.square(outputs - targets).mean(0), np.abs(outputs - targets).mean(0)
        rows = [{"mse": float(mse), "mae": float(mae)} for mse, mae in zip(squared, absolute)]
        figures = {"mse": float(squared.mean()), "mae": float(absolute.mean())}
        return TargetEvaluation(len(outputs), figures["mse"], figures, rows)
    from sklearn.metrics import average_precision_score  # a second to import

    positive: np.ndarray = np.greater(targets, 0.5)
    there = positive.sum(0) > 0
    precision = [
        float(average_precision_score(positive[:, column], outputs[:, column])) if there[column] else None
        for column in range(outputs.shape[1])
    ]
    known = [value for value in precision if value is not None]
    scores: list[dict[str, Any]] = [
        {"examples": int(count), "average_precision": value} for count, value in zip(positive.sum(0), precision)
    ]
    loss = float(np.mean(np.logaddexp(0, outputs) - targets * outputs))
    return TargetEvaluation(len(outputs), loss, {"map": float(np.mean(known)) if known else float("nan")}, scores)

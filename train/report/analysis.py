"""What predictions on held-out images say beyond accuracy: every class, calibration, the most confident mistakes.

Calibration error: Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599; its temperature divides the
logits. Precision, recall and F1 are scikit-learn's.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from train.compute import Predictions

_BINS = 15
# 1 is the temperature of the network as it was trained.
_TEMPERATURES = (0.05, 20.0)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How much the probability of the most probable class differs from how often it is right."""

    error: float  # expected calibration error, from 0 to 1: the mean difference over 15 bins of equal width
    temperature: float  # dividing the logits by it gives the lowest loss on these images
    # The error with temperatures. Each half of the images (even and odd places) is measured with the temperature of the
    # other half, as images that the temperature was not fitted to.
    error_after: float


def measure_calibration(predictions: Predictions) -> Calibration:
    """The calibration before and after dividing the logits by one temperature."""
    logits, labels = predictions.logits.astype(np.float64), predictions.label
    halves = (slice(0, None, 2), slice(1, None, 2))
    after = np.empty_like(logits)
    for mine, other in (halves, halves[::-1]):
        after[mine] = logits[mine] / fit_temperature(logits[other], labels[other])
    return Calibration(
        error=calibration_error(softmax(logits, axis=1), labels),
        temperature=fit_temperature(logits, labels),
        error_after=calibration_error(softmax(after, axis=1), labels),
    )


def fit_temperature(logits: Float[np.ndarray, "n k"], labels: Int[np.ndarray, " n"]) -> float:
    """The temperature in [0.05, 20] with the lowest mean cross entropy; 1 without examples."""
    if not len(labels):
        return 1.0

    def loss(log_temperature: float) -> float:
        chosen = log_softmax(logits / np.exp(log_temperature), axis=1)[np.arange(len(labels)), labels]
        return -float(chosen.mean())

    return float(np.exp(minimize_scalar(loss, bounds=np.log(_TEMPERATURES), method="bounded").x))


def calibration_error(probabilities: Float[np.ndarray, "n k"], labels: Int[np.ndarray, " n"]) -> float:
    """Expected calibration error of the most probable class, over 15 bins of equal width."""
    best = probabilities.argmax(1)
    confidence, right = probabilities[np.arange(len(best)), best], best == labels
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    difference = np.bincount(bins, confidence, _BINS) - np.bincount(bins, right, _BINS)
    return float(np.abs(difference).sum() / len(labels))


def class_scores(predictions: Predictions) -> list[dict[str, float | None]]:
    """Precision, recall and F1 of every class; None where they are not defined."""
    from sklearn.metrics import precision_recall_fscore_support

    classes = predictions.logits.shape[1]
    precision, recall, f1, _ = precision_recall_fscore_support(
        predictions.label, predictions.logits.argmax(1), labels=range(classes), zero_division=np.nan
    )
    named: dict[str, Any] = {"precision": precision, "recall": recall, "f1": f1}
    return [
        {name: None if np.isnan(values[label]) else float(values[label]) for name, values in named.items()}
        for label in range(classes)
    ]


def confident_mistakes(predictions: Predictions, count: int) -> Int[np.ndarray, " m"]:
    """Rows of the wrong predictions with the highest probabilities, the highest first; at most `count`."""
    probability = softmax(predictions.logits.astype(np.float64), axis=1).max(1)
    wrong: Bool[np.ndarray, " n"] = predictions.logits.argmax(1) != predictions.label
    rows = np.flatnonzero(wrong)
    return rows[np.argsort(-probability[rows], kind="stable")[:count]]


def largest_errors(
    answers: Float[np.ndarray, "n k"],
    targets: Float[np.ndarray, "n k"],
    scale: Float[np.ndarray, " k"],
    count: int,
    above: float,
) -> dict[int, int]:
    """At most `count` rows with the largest error of one target, the largest first, each with that target's column.

    `scale` divides the errors of each column; a column with 0 is left out.
    """
    errors = np.abs(answers - targets) / np.where(scale > 0, scale, np.inf)
    worst = errors.max(1)
    rows = np.argsort(-worst, kind="stable")[:count]
    return {int(row): int(errors[row].argmax()) for row in rows if worst[row] > above}

"""Evaluation on a whole split: masked sums count every example once, at any batch size and number of processes."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array

from poolformer_jax.errors import InputError
from poolformer_jax.network import cross_entropy
from train.compute.predictions import Predictions
from train.compute.sharding import batch_sharding, replicated, to_devices
from train.compute.state import Classifier
from train.compute.target_evaluation import TargetEvaluation, evaluate_targets

# With more classes the confusion matrix takes much memory and its picture is unreadable.
_MOST_CONFUSION_CLASSES = 100
_NO_EXAMPLE = "The evaluation split has no example. Expected at least one."
_NO_IMAGE = "No image of the evaluation split could be read. Expected at least one."

# (variables, masked batch) -> sums over the batch, and the logits of its rows
EvaluationStep = Callable[[Any, Mapping[str, Array]], tuple[dict[str, Array], Array]]
Normalize = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Results over a split."""

    examples: int  # number of examples counted
    loss: float  # mean cross entropy in nats, without label smoothing
    top1: float  # share whose most probable class is correct
    top5: float  # share whose correct class is among the five most probable
    class_examples: np.ndarray  # examples of each class, [classes]
    class_correct: np.ndarray  # those of them that top1 counts, [classes]
    class_predicted: np.ndarray  # examples whose most probable class is this one, [classes]
    confusion: np.ndarray | None  # [correct class, most probable class] counts, or None with many classes
    predictions: Predictions | None = None  # the logits of every example, if requested

    @property
    def balanced_accuracy(self) -> float:
        """The mean accuracy of the classes that have examples, as in scikit-learn."""
        there = self.class_examples > 0
        return float(np.mean(self.class_correct[there] / self.class_examples[there]))

    @property
    def f1(self) -> float:
        """The mean F1 of the classes that have examples or predictions, as scikit-learn's average="macro"."""
        pairs = self.class_examples + self.class_predicted
        return float(np.mean(2 * self.class_correct[pairs > 0] / pairs[pairs > 0]))

    @property
    def headline(self) -> str:
        """The accuracies in words; top-5 only with more than five classes, because it is 100 % otherwise."""
        return f"top-1 {self.top1:.2%}" + (f"  top-5 {self.top5:.2%}" if len(self.class_examples) > 5 else "")

    def summary(self) -> dict[str, float]:
        """The figures of the whole split, without those of each class."""
        return {
            "examples": self.examples,
            "loss": self.loss,
            "top1": self.top1,
            "top5": self.top5,
            "balanced_accuracy": self.balanced_accuracy,
            "f1": self.f1,
        }


AnyEvaluation = Evaluation | TargetEvaluation


def make_evaluation_step(
    model: Classifier,
    normalize: Normalize,
    mesh: Mesh,
    shardings: Any,
    flip: bool = False,
    kept_classes: Sequence[int] | None = None,
) -> EvaluationStep:
    """The compiled function from the model's variables and a masked batch to sums over its real examples, and logits.

    `flip` averages the logits of every image and of its mirror image. The logits of classes outside `kept_classes`
    become minus infinity.
    """
    classes, problem = model.config.num_labels, model.config.problem_type

    def sums(variables: Any, batch: Mapping[str, Array]) -> tuple[dict[str, Array], Array]:
        labels, mask = batch["label"], batch["mask"]
        pixels = normalize(batch["image"])
        output: Any = model.apply(variables, pixels)
        logits = output.logits
        if flip:
            mirrored: Any = model.apply(variables, pixels[:, :, ::-1])
            logits = (logits + mirrored.logits) / 2
        if kept_classes is not None:
            logits = jnp.where(np.isin(np.arange(classes), kept_classes), logits, -jnp.inf)
        if problem in ("multi_label_classification", "regression"):  # all figures follow from the outputs
            return {}, logits.astype(jnp.float32)
        best = lax.top_k(logits, min(5, classes))[1]
        hits = (best == labels[:, None]) & mask[:, None]
        totals = {
            # `where`, because the loss of padding may be infinite, and zero times infinity is NaN.
            "loss": jnp.where(mask, cross_entropy(logits, labels), 0).sum(),
            "top1": hits[:, 0].sum(),
            "top5": hits.sum(),
            "class_examples": jnp.zeros(classes, jnp.int32).at[labels].add(mask),
            "class_correct": jnp.zeros(classes, jnp.int32).at[labels].add(hits[:, 0]),
            "class_predicted": jnp.zeros(classes, jnp.int32).at[best[:, 0]].add(mask),
        }
        if classes <= _MOST_CONFUSION_CLASSES:
            totals["confusion"] = jnp.zeros((classes, classes), jnp.int32).at[labels, best[:, 0]].add(mask)
        return totals, logits.astype(jnp.float32)

    shares = batch_sharding(mesh)
    return jax.jit(sums, in_shardings=(shardings, shares), out_shardings=(replicated(mesh), shares))


def evaluate(
    step: EvaluationStep,
    weights: Mapping[str, Any],
    batches: Iterable[Mapping[str, np.ndarray]],
    mesh: Mesh,
    keep_logits: bool = False,
    problem: str | None = None,
) -> dict[str, AnyEvaluation]:
    """Runs `step` with every kind of weights on `batches`, this process's part of the split's.

    `weights` has the model's variables by kind, such as "params" and "ema". `keep_logits` also returns the predictions,
    whole on every process. Raises ValueError if the split has no example.
    """
    has_targets = problem in ("multi_label_classification", "regression")
    keep_logits = keep_logits or has_targets
    sums: dict[str, list[dict[str, Array]]] = {kind: [] for kind in weights}
    rows: list[Mapping[str, np.ndarray]] = []
    logits: dict[str, list[np.ndarray]] = {kind: [] for kind in weights}
    for batch in batches:
        shares = to_devices(mesh, batch, ("image", "label", "mask"))
        for kind, variables in weights.items():
            totals, outputs = step(variables, shares)
            sums[kind].append(totals)
            if keep_logits:
                logits[kind].append(local_rows(outputs))
        if keep_logits:
            rows.append({name: batch[name] for name in ("index", "label", "mask")})
        # So that the host does not fill the devices' memory with waiting batches.
        jax.block_until_ready([parts[-2:-1] for parts in sums.values()])
    if has_targets:
        return {kind: _target_evaluation(problem, rows, logits[kind]) for kind in weights}
    evaluations = {kind: _evaluation(jax.device_get(parts)) for kind, parts in sums.items()}
    if not keep_logits:
        return dict(evaluations)
    return {
        kind: dataclasses.replace(evaluation, predictions=gather_predictions(rows, logits[kind]))
        for kind, evaluation in evaluations.items()
    }


def local_rows(outputs: Array) -> np.ndarray:
    """The rows of a sharded batch that this process's devices have, in order."""
    shards = sorted(outputs.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


def gather_predictions(rows: Sequence[Mapping[str, np.ndarray]], logits: Sequence[np.ndarray]) -> Predictions:
    """All processes' rows in the order of the split, without those that are masked."""
    columns = {name: np.concatenate([row[name] for row in rows]) for name in ("index", "label", "mask")}
    columns["logits"] = np.concatenate(logits)
    if jax.process_count() > 1:  # every process has the same number of rows
        columns = {name: np.concatenate(multihost_utils.process_allgather(value)) for name, value in columns.items()}
    real = np.flatnonzero(columns.pop("mask"))
    order = real[np.argsort(columns["index"][real], kind="stable")]
    return Predictions(**{name: value[order] for name, value in columns.items()})


def _target_evaluation(
    problem: Any, rows: Sequence[Mapping[str, np.ndarray]], logits: Sequence[np.ndarray]
) -> TargetEvaluation:
    if not rows:
        raise InputError(_NO_EXAMPLE)
    found = gather_predictions(rows, logits)
    if len(found.label) == 0:
        raise InputError(_NO_IMAGE)
    return evaluate_targets(problem, found)


def _evaluation(parts: Sequence[Mapping[str, np.ndarray]]) -> Evaluation:
    """The sums of single batches, added up."""
    if not parts:
        raise InputError(_NO_EXAMPLE)
    # Counts are added as int64 and the loss in float64 on the host: exact for any split.
    total = jax.tree.map(lambda *values: np.sum(np.stack(values), 0, dtype=_wide(values[0])), *parts)
    examples = int(total["class_examples"].sum())
    if examples == 0:
        raise InputError(_NO_IMAGE)
    return Evaluation(
        examples=examples,
        loss=float(total["loss"] / examples),
        top1=int(total["top1"]) / examples,
        top5=int(total["top5"]) / examples,
        class_examples=total["class_examples"],
        class_correct=total["class_correct"],
        class_predicted=total["class_predicted"],
        confusion=total.get("confusion"),
    )


def _wide(value: np.ndarray) -> type:
    return np.int64 if np.issubdtype(value.dtype, np.integer) else np.float64

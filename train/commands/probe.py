"""`python -m train probe SOURCE --data ...`: how well a network's features separate classes, without training it.

The features of both splits are computed once. scikit-learn fits a linear probe (logistic regression, as a new head
would learn) and a k-NN classifier to those of the training split.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import track
from scipy.special import log_softmax

from poolformer_jax import ImageEmbedder, PoolFormerConfig, PoolFormerForImageClassification, save_pretrained
from poolformer_jax.errors import InputError
from poolformer_jax.fields import check_rules
from poolformer_jax.files import write_json
from poolformer_jax.images import ImageError
from poolformer_jax.weights import OpenedModel, build_model
from train.commands.model_data import ModelOnData
from train.compute import Evaluation, Predictions
from train.data import Source, open_source, read_example
from train.folders import refuse_run_folder
from train.report import evaluation_report, write_report_files

# The logit of a class that the training split does not have.
_NEVER = -1e4


@dataclasses.dataclass(frozen=True)
class ProbeConfig(ModelOnData):
    """A network, and the data whose classes its features are tried on."""

    regularization: float = 1.0
    """The linear probe's C, on standardized features: smaller is stronger."""
    neighbors: int = 20
    """The k of k-NN, by cosine similarity; at most the number of training images."""
    batch_size: int = 64
    """Images in a step."""
    output: Path | None = None
    """Folder for the network with the linear probe as its head, a model folder with the report of its evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rules = [
            ("regularization", self.regularization > 0, "a positive number"),
            ("neighbors", self.neighbors >= 1, "at least 1"),
        ]
        check_rules(self, rules)


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """Accuracies on the evaluation split."""

    linear: Evaluation  # of the linear probe, with its predictions
    knn_top1: float  # share of images whose class most of the nearest neighbours have


def run_probe(config: ProbeConfig, console: Console) -> ProbeResult:
    """Computes the features, fits both classifiers, prints their accuracy, and writes `config.output` if given.

    Raises InputError if network and data do not fit each other.
    """
    from sklearn.neighbors import KNeighborsClassifier

    refuse_run_folder(config.source)
    opened = config.open_model()
    model, variables = build_model(opened)
    embedder = ImageEmbedder(model.config, variables, opened.image_processor, batch_size=config.batch_size)
    data = config.data_config(embedder.image_processor)
    train, held_out = (open_source(data, split) for split in (data.train_split, data.evaluation_split))
    if held_out.class_names != train.class_names:
        raise InputError(f"The splits of {config.data} have different classes. Expected the same ones, or --class-map.")
    features, labels, _ = _embed(embedder, train, "Training images", console)
    if len(np.unique(labels)) < 2:
        raise InputError(f"The training images of {config.data} have one class. Expected two or more.")
    queries, answers, places = _embed(embedder, held_out, "Held-out images", console)
    kernel, bias = fit_linear(features, labels, len(train.class_names), config.regularization)
    linear = _evaluation(Predictions(places, answers, queries @ kernel + bias))
    nearest = KNeighborsClassifier(min(config.neighbors, len(labels)), metric="cosine").fit(features, labels)
    result = ProbeResult(linear, float(nearest.score(queries, answers)))
    print(f"{len(labels):,} images to fit to, {linear.examples:,} to score")
    print(f"linear probe  top-1 {linear.top1:.2%}   loss {linear.loss:.4f}")
    print(f"k-NN          top-1 {result.knn_top1:.2%}   ({nearest.n_neighbors} neighbours)")
    if config.output is not None:
        names = dict(enumerate(train.class_names))
        network = dataclasses.replace(
            model.config, head="linear", num_labels=len(names), id2label=names, problem_type=None
        )
        params = {**variables["params"], "head": {"kernel": kernel, "bias": bias}}
        _write_model(config.output, config, network, {**variables, "params": params}, opened, linear, held_out)
    return result


def _write_model(
    folder: Path,
    config: ProbeConfig,
    network: PoolFormerConfig,
    variables: Mapping[str, Any],
    opened: OpenedModel,
    linear: Evaluation,
    held_out: Source,
) -> None:
    """Writes the network with the linear probe as its head, and the report of the probe's evaluation."""
    report = evaluation_report(linear, held_out.class_names)
    save_pretrained(
        folder,
        PoolFormerForImageClassification(network),
        variables,
        image_processor=opened.image_processor,
        metrics={name: value for name, value in report.items() if isinstance(value, int | float)},
    )
    write_json(folder / "evaluation.json", {"model": config.source, "data": config.data, **report})
    write_report_files(folder, f"Linear probe of {config.source}", linear, report, held_out)
    print(f"Written to {folder}")


def fit_linear(
    features: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"], classes: int, regularization: float
) -> tuple[Float[np.ndarray, "c k"], Float[np.ndarray, " k"]]:
    """Kernel and bias of a head, by scikit-learn's logistic regression on standardized features.

    Args:
        features: of the training images.
        labels: their classes, at least two.
        classes: k; classes without an image get a logit of -10,000.
        regularization: C of the regression.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(features)
    fitted = LogisticRegression(C=regularization, max_iter=2000).fit(scaler.transform(features), labels)
    weights, offsets = fitted.coef_.T, fitted.intercept_
    if len(fitted.classes_) == 2:  # one logit, that of the second class
        weights, offsets = np.hstack([0 * weights, weights]), np.array([0.0, offsets[0]])
    # The head takes features as they are: x_scaled @ w = x @ (w / scale) - mean @ (w / scale).
    weights = weights / scaler.scale_[:, None]
    kernel, bias = np.zeros((features.shape[1], classes)), np.full(classes, _NEVER)
    kernel[:, fitted.classes_], bias[fitted.classes_] = weights, offsets - scaler.mean_ @ weights
    return kernel.astype(np.float32), bias.astype(np.float32)


def _embed(
    embedder: ImageEmbedder, source: Source, doing: str, console: Console
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, labels and places of the images of a split that can be read."""
    labels: list[int] = []

    def images() -> Iterator[Any]:
        for index in range(len(source)):
            example = source[index]
            labels.append(example["label"])
            image = example["image"]
            # Threads of the embedder decode files; no bytes are an unreadable file.
            yield b"" if isinstance(image, ImageError) else image if isinstance(image, bytes) else read_example(example)

    rows = track(embedder.stream(images()), doing, total=len(source), console=console)
    found = [None if isinstance(row, ImageError) else row.features for row in rows]
    places = np.array([index for index, row in enumerate(found) if row is not None])
    if not len(places):
        raise InputError("No image of a split could be read. Expected at least one.")
    if bad := len(found) - len(places):
        console.print(f"{doing}: {bad:,} could not be read and are left out.", markup=False, highlight=False)
    return np.stack([found[index] for index in places]), np.array(labels, np.int32)[places], places


def _evaluation(predictions: Predictions) -> Evaluation:
    logits, labels = predictions.logits, predictions.label
    count, classes = logits.shape
    best = logits.argmax(1)
    confusion = np.zeros((classes, classes), int)
    np.add.at(confusion, (labels, best), 1)
    chosen = logits[np.arange(count), labels]
    return Evaluation(
        examples=count,
        loss=-float(log_softmax(logits.astype(np.float64), axis=1)[np.arange(count), labels].mean()),
        top1=float((best == labels).mean()),
        top5=float(((logits > chosen[:, None]).sum(1) < 5).mean()),
        class_examples=confusion.sum(1),
        class_correct=confusion.diagonal(),
        class_predicted=confusion.sum(0),
        confusion=confusion if classes <= 100 else None,
        predictions=predictions,
    )

"""Training of the head alone: the features of every image are computed once, and the head learns from them.

The features are what the frozen backbone gives, after the final norm and the mean over positions. Steps and evaluations
are those of a whole network, with `FeatureClassifier` in its place.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from poolformer_jax import PoolFormerConfig, PoolFormerForImageClassification
from poolformer_jax.errors import InputError
from poolformer_jax.network import ImageClassifierOutput, classify_features, mean_loss
from train.compute.evaluation import Normalize, gather_predictions, local_rows
from train.compute.optimizer import frozen
from train.compute.predictions import Predictions
from train.compute.sharding import batch_sharding, process_part, to_devices
from train.config import TrainConfig
from train.data import Source, evaluation_batches, evaluation_steps, train_batches, train_places

_MOST_BYTES = 2**31  # of training features, in the memory of every host

Batch = Mapping[str, np.ndarray]
# Compiled: (variables, images [b, h, w, c]) -> features [b, c]
FeatureStep = jax.stages.Wrapped


class FeatureClassifier(nn.Module):
    """The head of a network: features in, logits out. Its variables are those of the whole network."""

    config: PoolFormerConfig

    @nn.compact
    def __call__(
        self, features: Float[Array, "b c"], labels: Array | None = None, train: bool = False
    ) -> ImageClassifierOutput:
        """The logits, and the loss where labels are given; the arguments are as in the whole network."""
        dropout = nn.Dropout(self.config.head_dropout_rate, deterministic=not train, name="head_dropout")
        logits = classify_features(self.config, self.get_variable("params", "head"), features, dropout)
        loss = None if labels is None else mean_loss(self.config, logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=())


def learns_from_features(config: TrainConfig, network: PoolFormerConfig, params: Any, images: int) -> bool:
    """True if every image has the same features in all steps, and those of `images` images fit into memory.

    So it is if only the head is learnt, nothing is augmented, and below the head nothing is dropped.
    """
    if not config.optimizer.freeze or config.data.augments or network.drop_path_rate or network.dropout_rate:
        return False
    below = {name: tree for name, tree in frozen(params, config.optimizer).items() if name != "head"}
    return all(jax.tree.leaves(below)) and 4 * images * network.hidden_sizes[-1] <= _MOST_BYTES


def make_feature_step(
    model: PoolFormerForImageClassification, normalize: Normalize, mesh: Mesh, shardings: Any
) -> FeatureStep:
    """The compiled function from the variables of `model`, sharded as `shardings`, and images to features."""
    backbone = model.clone(config=dataclasses.replace(model.config, num_labels=0, id2label=None))

    def features(variables: Any, images: Array) -> Array:
        output: Any = backbone.apply(variables, normalize(images))
        return output.logits

    shares = batch_sharding(mesh)
    return jax.jit(features, in_shardings=(shardings, shares), out_shardings=shares)


@contextlib.contextmanager
def open_batches(
    config: TrainConfig,
    source: Source,
    held_out: Source,
    mesh: Mesh,
    step: int,
    feature_step: FeatureStep | None,
    variables: Any,
) -> Iterator[tuple[Iterator[Batch], Iterator[Batch]]]:
    """This process's batches of training from `step` on, and of evaluation, both without end.

    With `feature_step`, "image" is the features, which are computed here with `variables`.
    """
    part = process_part(mesh)
    if feature_step is None:
        with (
            train_batches(config.data, source, start_step=step, **part) as batches,
            evaluation_batches(config.data, held_out, repeat=True, **part) as split,
        ):
            yield batches, split
        return
    found = []
    for images in (source, held_out):
        with evaluation_batches(config.data, images, **part) as once:
            found.append(_compute_features(feature_step, variables, once, mesh))
    places = train_places(config.data, source, start_step=step, **part)
    size = config.data.evaluation_size // part["process_count"]
    starts = range(0, evaluation_steps(config.data, held_out) * size * part["process_count"], size)
    yield (
        _training_batches(found[0], places),
        _evaluation_batches(found[1], starts[part["process_index"] :: part["process_count"]], size),
    )


def _compute_features(step: FeatureStep, variables: Any, batches: Iterable[Batch], mesh: Mesh) -> Predictions:
    """The features of all images that can be read, whole on every process, as `logits`."""
    rows, features = [], []
    for batch in batches:
        features.append(local_rows(step(variables, to_devices(mesh, batch, ("image",))["image"])))
        rows.append({name: batch[name] for name in ("index", "label", "mask")})
    found = gather_predictions(rows, features)
    if len(found.index) == 0:
        raise InputError("No image of a split could be read. Expected at least one.")
    return found


def _training_batches(found: Predictions, places: Iterable[np.ndarray]) -> Iterator[Batch]:
    for wanted in places:
        # Of an image that cannot be read, the next one that can, as in batches of images.
        rows = np.searchsorted(found.index, wanted) % len(found.index)
        yield {"image": found.logits[rows], "label": found.label[rows]}


def _evaluation_batches(found: Predictions, starts: Iterable[int], size: int) -> Iterator[Batch]:
    for start in itertools.cycle(starts):
        places = np.arange(start, start + size)
        rows = np.minimum(places, len(found.index) - 1)
        yield {
            "image": found.logits[rows],
            "label": found.label[rows],
            "mask": places < len(found.index),
            "index": found.index[rows],
        }

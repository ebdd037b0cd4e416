"""`python -m train show RECIPE`: a sheet of augmented pictures with their targets, as the network sees them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from train.config import TrainConfig
from train.data import augment_batch, open_source, train_batches
from train.report import draw, paint_sheet

_MOST_PICTURES = 36
_MOST_TARGETS = 2


def show_batch(config: TrainConfig) -> Path:
    """Writes augmented.png into the run's folder: the pictures of the first batch.

    They are those of the run, up to rounding: the same images, crops, mixing and noise. Raises InputError if the data
    cannot be opened or read.
    """
    source = open_source(config.data, config.data.train_split)
    with train_batches(config.data, source) as batches:
        batch = next(batches)
    key, _ = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0))  # as in the training step
    images, labels = jnp.asarray(batch["image"]), jnp.asarray(batch["label"])
    pixels, targets = augment_batch(key, images, labels, config.data, num_classes=len(source.class_names))
    values = np.asarray(pixels[:_MOST_PICTURES]) * config.data.image_std + config.data.image_mean
    pictures = np.rint(255 * np.clip(values, 0, 1)).astype(np.uint8)
    captions = [_caption(row, source.class_names, config) for row in np.asarray(targets[:_MOST_PICTURES])]
    path = config.run_dir / "augmented.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path, paint_sheet, list(pictures), captions)
    return path


def _caption(targets: np.ndarray, class_names: tuple[str, ...], config: TrainConfig) -> list[tuple[str, str]]:
    """The largest targets, at least one, each as the name of its class and the value."""
    numbers = config.data.problem_type == "regression"
    # What smoothing adds to every class is not worth a line.
    order = range(len(targets)) if numbers else np.argsort(-targets, kind="stable")
    smoothing = config.data.mix.label_smoothing
    least = -np.inf if numbers else smoothing / 2 if config.data.has_target_vectors else smoothing / len(targets)
    chosen = [label for label in order if targets[label] > least + 1e-4][:_MOST_TARGETS] or order[:1]
    return [(class_names[label], f"{targets[label]:.3g}" if numbers else f"{targets[label]:.0%}") for label in chosen]

"""Data sets without files: scikit-learn's handwritten digits, and synthetic images for tests and benchmarks."""

import numpy as np

from poolformer_jax.resources import format_bytes, free_memory
from train.data.sources.source import ArraySource, SourceError, drawn_rows


def open_digits(split: str, share: float) -> ArraySource:
    """Scikit-learn's handwritten digits: 1797 scans of 8 x 8 pixels in 17 levels of grey, scaled to 0..255."""
    from sklearn.datasets import load_digits

    _require_split("digits", split)
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    ids = [f"digits/{index:04d}" for index in range(len(labels))]
    rows = drawn_rows(split, ids, labels, share)
    return ArraySource(images[rows], labels[rows], tuple(ids[row] for row in rows), tuple("0123456789"))


def open_synthetic(split: str, examples: int, image_size: int, num_channels: int) -> ArraySource:
    """Generated images that a network can learn: gratings in ten directions, with noise.

    The two splits have the same classes and different images. Raises SourceError if they do not fit into memory.
    """
    _require_split("synthetic", split)
    rng = np.random.default_rng([split == "validation", examples, image_size, num_channels])
    needed = examples * image_size**2 * num_channels
    if needed > (free := free_memory()):
        raise SourceError(
            f"{examples:,} synthetic images of {image_size} x {image_size} pixels need {format_bytes(needed)} of "
            f"memory, and {format_bytes(free)} are free. Expected fewer --data.synthetic-examples, or a smaller "
            "--data.image-size."
        )
    classes = 10
    labels = np.arange(examples) % classes
    angle = labels * np.pi / classes + rng.normal(0, 0.03, examples)
    phase = rng.uniform(0, 2 * np.pi, examples)
    waves = 4.0  # across the image at any size
    position = np.linspace(-np.pi, np.pi, image_size, endpoint=False) * waves
    images = np.empty((examples, image_size, image_size, num_channels), np.uint8)
    for index in range(examples):
        wave = np.cos(angle[index]) * position[:, None] + np.sin(angle[index]) * position + phase[index]
        noise = rng.normal(0, 25, (image_size, image_size, num_channels))
        images[index] = np.clip(128 + 70 * np.sin(wave)[..., None] + noise, 0, 255)
    ids = tuple(f"synthetic/{split}/{index:06d}" for index in range(examples))
    return ArraySource(images, labels, ids, tuple(f"{18 * number} degrees" for number in range(classes)))


def _require_split(name: str, split: str) -> None:
    if split not in ("train", "validation"):
        raise SourceError(f"The data set {name} has no split {split!r}. Expected train or validation.")

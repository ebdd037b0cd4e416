"""What all contenders are given: a network's weights in a folder that all of them read, pixels, and labels."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from poolformer_jax import PoolFormerConfig, PoolFormerForImageClassification, save_pretrained
from poolformer_jax.summary import parameter_shapes

IMAGE_SIZE = 224


def write_inputs(folder: Path, config: PoolFormerConfig, batch: int, image_size: int = IMAGE_SIZE) -> None:
    """A model folder as `transformers` and `load_pretrained` read it, with pixels.npy and labels.npy in it."""
    model = PoolFormerForImageClassification(config)
    save_pretrained(folder, model, {"params": random_parameters(config)}, layout="hf")
    rng = np.random.default_rng(1)
    np.save(folder / "pixels.npy", rng.standard_normal((batch, image_size, image_size, 3), np.float32))
    np.save(folder / "labels.npy", rng.integers(config.num_labels, size=batch))


def random_parameters(config: PoolFormerConfig, seed: int = 0) -> Any:
    """Parameters with which every part of the network has a say in the logits.

    Layer scales as initialised, 1e-5, would hide a wrong branch from the comparison of the results.
    """
    rng = np.random.default_rng(seed)

    def draw(path: Any, shape: Any) -> np.ndarray:
        values = rng.standard_normal(shape.shape, np.float32)
        match path[-1].key:
            case "kernel":
                return values / np.float32(np.sqrt(np.prod(shape.shape[:-1])))
            case "scale" if "layer_scale" in path[-2].key:
                return 0.3 + 0.1 * values
            case "scale":
                return 1 + 0.2 * values
            case _:
                return 0.1 * values

    return jax.tree.map_with_path(draw, parameter_shapes(config))


def read_pixels(folder: Path) -> np.ndarray:
    """The normalised images, [batch, height, width, 3], float32."""
    return np.load(folder / "pixels.npy")


def read_labels(folder: Path) -> np.ndarray:
    """A class for each of them."""
    return np.load(folder / "labels.npy")

"""What all contenders are given: a network's weights in a folder that all of them read, pixels, and labels."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

# Contenders have the devices; this process makes shapes, and must not take a GPU's memory for that.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from poolformer_jax import PoolFormerConfig, PoolFormerForImageClassification, save_pretrained
from poolformer_jax.inference.cost_operations import parameter_shapes

IMAGE_SIZE = 224


def write_inputs(folder: Path, config: PoolFormerConfig, batch: int, image_size: int = IMAGE_SIZE) -> None:
    """A model folder as `transformers` and `load_pretrained` read it, with pixels.npy and labels.npy in it."""
    model = PoolFormerForImageClassification(config)
    save_pretrained(folder, model, {"params": random_parameters(config)}, layout="hf")
    rng = np.random.default_rng(1)
    np.save(folder / "pixels.npy", rng.standard_normal((batch, image_size, image_size, 3), np.float32))
    np.save(folder / "labels.npy", rng.integers(config.num_labels, size=batch))


def write_timm_weights(folder: Path, config: PoolFormerConfig) -> None:
    """The same parameters for timm, in the folder's `timm`."""
    model = PoolFormerForImageClassification(replace(config, head_order="pool_norm"))
    save_pretrained(folder / "timm", model, {"params": random_parameters(config)}, layout="timm")


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

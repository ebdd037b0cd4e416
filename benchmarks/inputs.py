"""The inputs that all implementations read from one folder: weights, pixels and labels."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

# The implementations use the devices. This process only makes arrays and must not reserve a GPU's memory.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from poolformer_jax import PoolFormerConfig, PoolFormerForImageClassification, save_pretrained
from poolformer_jax.inference import parameter_shapes
from poolformer_jax.network import SIZES, VARIANTS

IMAGE_SIZE = 224


# The networks that PyTorch libraries have, and the library: transformers has the first paper's alone.
LIBRARY_OF = dict.fromkeys(SIZES, "transformers") | {
    name: "timm" for name in VARIANTS if name.startswith(("poolformerv2", "convformer", "caformer"))
}


def write_inputs(
    folder: Path,
    config: PoolFormerConfig,
    batch: int,
    library: str = "transformers",
    image_size: int = IMAGE_SIZE,
) -> None:
    """Writes a model folder for `library` and for `load_pretrained`, with pixels.npy and labels.npy."""
    if library == "timm":
        config = replace(config, head_norm_epsilon=1e-6)
    model, layout = PoolFormerForImageClassification(config), "timm" if library == "timm" else "hf"
    save_pretrained(folder, model, {"params": random_parameters(config)}, layout=layout)
    rng = np.random.default_rng(1)
    np.save(folder / "pixels.npy", rng.standard_normal((batch, image_size, image_size, 3), np.float32))
    np.save(folder / "labels.npy", rng.integers(config.num_labels, size=batch))


def write_timm_weights(folder: Path, config: PoolFormerConfig) -> None:
    """Writes the same parameters of a network of the first paper for timm, into the subfolder `timm`."""
    model = PoolFormerForImageClassification(replace(config, head_order="pool_norm"))
    save_pretrained(folder / "timm", model, {"params": random_parameters(config)}, layout="timm")


def random_parameters(config: PoolFormerConfig) -> Any:
    """Parameters with which every branch affects the logits.

    With the initial layer scale of 1e-5, the comparison of the results would miss a wrong branch.
    """
    rng = np.random.default_rng(0)

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

"""Lowers the training step for devices that need not be present; only their compiler is needed.

Import this after JAX_PLATFORMS is set.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from poolformer_jax import PoolFormerConfig
from poolformer_jax.inference import count_macs
from train.config import TrainConfig
from train.recipes import RECIPES
from train.setup import make_parts

CLASSES, EXAMPLES, SIZE = 1000, 1_281_167, 224


@dataclass(frozen=True)
class Step:
    """A training step in bfloat16."""

    variant: str  # s12 ... m48
    images: int  # images per device
    kernels: bool = True  # True to use Pallas kernels if there are any for the devices
    fused: bool = True  # False for the blocks as the paper writes them


def lower_training(step: Step, devices: Sequence[jax.Device]) -> jax.stages.Lowered:
    """The step of the training program without augmentation: normalisation on the device, gradient, AdamW."""
    parts = make_parts(_recipe(step, len(devices)), [str(n) for n in range(CLASSES)], EXAMPLES, devices, step.fused)
    sharding = NamedSharding(parts.mesh, PartitionSpec(parts.mesh.axis_names))
    batch = step.images * len(devices)
    return parts.step.lower(
        parts.abstract_state,
        {
            "image": jax.ShapeDtypeStruct((batch, SIZE, SIZE, 3), jnp.uint8, sharding=sharding),
            "label": jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=sharding),
        },
    )


def _recipe(step: Step, devices: int) -> TrainConfig:
    """The ImageNet recipe of the variant without augmentation."""
    recipe = RECIPES[f"imagenet-{step.variant}"].config
    mix = dataclasses.replace(recipe.data.mix, mixup=0.0, cutmix=0.0, erase_probability=0.0)
    data = dataclasses.replace(recipe.data, batch_size=step.images * devices, mix=mix)
    # AdamW in all recipes, as in the step of other libraries' networks. The rate is not scaled by the batch: with few
    # images the peak would be below the final rate, which is an error.
    optimizer = dataclasses.replace(recipe.optimizer, name="adamw", learning_rate_batch=None)
    return dataclasses.replace(
        recipe, data=data, optimizer=optimizer, dtype="bfloat16", kernels="on" if step.kernels else "off"
    )


def operations(variant: str, work: str) -> int:
    """Operations per image: two per multiply-accumulate of the network, and three times as many in training.

    Recomputation in the compiled program is not counted.
    """
    return 2 * count_macs(PoolFormerConfig.from_variant(variant)) * (3 if work == "training" else 1)

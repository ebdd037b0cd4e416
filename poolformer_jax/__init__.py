"""PoolFormer in JAX / Flax: the public names, and nothing else."""

from poolformer_jax.config import PoolFormerConfig
from poolformer_jax.model import (
    ImageClassifierOutput,
    PoolFormerForImageClassification,
    PoolFormerModel,
    PoolFormerModelOutput,
)

__version__ = "0.1.0.dev0"

__all__ = [
    "ImageClassifierOutput",
    "PoolFormerConfig",
    "PoolFormerForImageClassification",
    "PoolFormerModel",
    "PoolFormerModelOutput",
]

"""PoolFormer in JAX / Flax: the public names, and nothing else.

A name is imported when it is first asked for, so that a data-loading process can use the image processor without jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from poolformer_jax.config import PoolFormerConfig
    from poolformer_jax.image_processor import PoolFormerImageProcessor
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
    "PoolFormerImageProcessor",
    "PoolFormerModel",
    "PoolFormerModelOutput",
]

# The module each public name lives in.
_HOME = {
    "ImageClassifierOutput": "model",
    "PoolFormerConfig": "config",
    "PoolFormerForImageClassification": "model",
    "PoolFormerImageProcessor": "image_processor",
    "PoolFormerModel": "model",
    "PoolFormerModelOutput": "model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

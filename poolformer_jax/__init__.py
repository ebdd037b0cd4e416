"""PoolFormer in JAX / Flax: the public names, and nothing else.

A name is imported when it is first asked for: data-loading processes use the image processor and must not import jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from poolformer_jax.errors import InputError, PoolFormerError
    from poolformer_jax.export import ExportError, export_model
    from poolformer_jax.images import ImageError, PoolFormerFeatureExtractor, PoolFormerImageProcessor
    from poolformer_jax.inference import GradCam, HeightShardedModel, ImageClassifier, Prediction
    from poolformer_jax.network import WeightsMismatch
    from poolformer_jax.network.config import PoolFormerConfig
    from poolformer_jax.network.fused import GpuKernels, TpuKernels
    from poolformer_jax.network.model import (
        ImageClassifierOutput,
        PoolFormerForImageClassification,
        PoolFormerModel,
        PoolFormerModelOutput,
    )
    from poolformer_jax.weights import (
        WeightsFileError,
        from_torch_state_dict,
        load_pretrained,
        save_pretrained,
        to_torch_state_dict,
    )

from poolformer_jax.version import __version__ as __version__

__all__ = [
    "ExportError",
    "GpuKernels",
    "GradCam",
    "HeightShardedModel",
    "ImageClassifier",
    "ImageClassifierOutput",
    "ImageError",
    "InputError",
    "PoolFormerConfig",
    "PoolFormerError",
    "PoolFormerFeatureExtractor",
    "PoolFormerForImageClassification",
    "PoolFormerImageProcessor",
    "PoolFormerModel",
    "PoolFormerModelOutput",
    "Prediction",
    "TpuKernels",
    "WeightsFileError",
    "WeightsMismatch",
    "export_model",
    "from_torch_state_dict",
    "load_pretrained",
    "save_pretrained",
    "to_torch_state_dict",
]

# The module that each public name comes from.
_HOME = {
    "InputError": "errors",
    "PoolFormerError": "errors",
    "ExportError": "export",
    "GpuKernels": "network.fused",
    "GradCam": "inference",
    "HeightShardedModel": "inference",
    "ImageClassifier": "inference",
    "ImageClassifierOutput": "network.model",
    "ImageError": "images",
    "PoolFormerConfig": "network.config",
    "PoolFormerFeatureExtractor": "images",
    "PoolFormerForImageClassification": "network.model",
    "PoolFormerImageProcessor": "images",
    "PoolFormerModel": "network.model",
    "PoolFormerModelOutput": "network.model",
    "Prediction": "inference",
    "TpuKernels": "network.fused",
    "WeightsFileError": "weights",
    "WeightsMismatch": "network",
    "export_model": "export",
    "from_torch_state_dict": "weights",
    "load_pretrained": "weights",
    "save_pretrained": "weights",
    "to_torch_state_dict": "weights",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

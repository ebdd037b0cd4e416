"""PoolFormer in JAX / Flax: the public names, and nothing else.

A name is imported when it is first asked for: data-loading processes use the image processor and must not import jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from poolformer_jax.cam import GradCam
    from poolformer_jax.config import PoolFormerConfig
    from poolformer_jax.export import ExportError, export_model
    from poolformer_jax.image_processor import PoolFormerFeatureExtractor, PoolFormerImageProcessor
    from poolformer_jax.image_reading import ImageError
    from poolformer_jax.inference import ImageClassifier, Prediction
    from poolformer_jax.kernels import GpuKernels, TpuKernels
    from poolformer_jax.large_image import HeightShardedModel
    from poolformer_jax.model import (
        ImageClassifierOutput,
        PoolFormerForImageClassification,
        PoolFormerModel,
        PoolFormerModelOutput,
    )
    from poolformer_jax.pretrained import load_pretrained, save_pretrained
    from poolformer_jax.torch_weights import WeightsMismatch, from_torch_state_dict, to_torch_state_dict
    from poolformer_jax.torch_weights.files import WeightsFileError

__version__ = "0.1.0.dev0"

__all__ = [
    "ExportError",
    "GpuKernels",
    "GradCam",
    "HeightShardedModel",
    "ImageClassifier",
    "ImageClassifierOutput",
    "ImageError",
    "PoolFormerConfig",
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
    "ExportError": "export",
    "GradCam": "cam",
    "HeightShardedModel": "large_image",
    "ImageClassifier": "inference",
    "ImageClassifierOutput": "model",
    "ImageError": "image_reading",
    "PoolFormerConfig": "config",
    "PoolFormerFeatureExtractor": "image_processor",
    "PoolFormerForImageClassification": "model",
    "PoolFormerImageProcessor": "image_processor",
    "PoolFormerModel": "model",
    "PoolFormerModelOutput": "model",
    "Prediction": "inference",
    "GpuKernels": "kernels",
    "TpuKernels": "kernels",
    "WeightsFileError": "torch_weights.files",
    "WeightsMismatch": "torch_weights",
    "export_model": "export",
    "from_torch_state_dict": "torch_weights",
    "load_pretrained": "pretrained",
    "save_pretrained": "pretrained",
    "to_torch_state_dict": "torch_weights",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

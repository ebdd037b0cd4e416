"""PoolFormer in JAX / Flax: the public names, and nothing else.

Each is imported when it is first used, so that data-loading processes can use the image processor without jax.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from poolformer_jax.errors import InputError, PoolFormerError
    from poolformer_jax.export import ExportError, export_model
    from poolformer_jax.images import ImageError, PoolFormerFeatureExtractor, PoolFormerImageProcessor
    from poolformer_jax.inference import (
        GradCam,
        HeightShardedModel,
        ImageClassifier,
        ImageEmbedder,
        Prediction,
        pipeline,
    )
    from poolformer_jax.network import (
        ImageClassifierOutput,
        PoolFormerConfig,
        PoolFormerForImageClassification,
        PoolFormerModel,
        PoolFormerModelOutput,
        WeightsMismatch,
    )
    from poolformer_jax.network.fused import GpuKernels, TpuKernels
    from poolformer_jax.weights import (
        FlaxPoolFormerForImageClassification,
        FlaxPoolFormerModel,
        WeightsFileError,
        from_torch_state_dict,
        load_pretrained,
        save_pretrained,
        to_torch_state_dict,
    )

from poolformer_jax.lazy import lazy_names
from poolformer_jax.version import __version__ as __version__

__all__ = [
    "ExportError",
    "FlaxPoolFormerForImageClassification",
    "FlaxPoolFormerModel",
    "GpuKernels",
    "GradCam",
    "HeightShardedModel",
    "ImageClassifier",
    "ImageClassifierOutput",
    "ImageEmbedder",
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
    "pipeline",
    "save_pretrained",
    "to_torch_state_dict",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "errors": "InputError PoolFormerError",
        "network": "ImageClassifierOutput PoolFormerConfig PoolFormerForImageClassification PoolFormerModel "
        "PoolFormerModelOutput WeightsMismatch",
        "network.fused": "GpuKernels TpuKernels",
        "images": "ImageError PoolFormerFeatureExtractor PoolFormerImageProcessor",
        "weights": "FlaxPoolFormerForImageClassification FlaxPoolFormerModel WeightsFileError "
        "from_torch_state_dict load_pretrained save_pretrained to_torch_state_dict",
        "inference": "GradCam HeightShardedModel ImageClassifier ImageEmbedder Prediction pipeline",
        "export": "ExportError export_model",
    },
)

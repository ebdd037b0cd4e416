"""Models in and out: PyTorch's names and files, opening a model, model folders. Only this room knows these names."""

from typing import TYPE_CHECKING

from poolformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from poolformer_jax.weights.containers.files import WeightsFile as WeightsFile
    from poolformer_jax.weights.containers.files import WeightsFileError as WeightsFileError
    from poolformer_jax.weights.containers.files import is_index as is_index
    from poolformer_jax.weights.containers.files import open_weights as open_weights
    from poolformer_jax.weights.containers.writers import write_safetensors as write_safetensors
    from poolformer_jax.weights.containers.writers import write_torch as write_torch
    from poolformer_jax.weights.flax_models import (
        FlaxPoolFormerForImageClassification as FlaxPoolFormerForImageClassification,
    )
    from poolformer_jax.weights.flax_models import FlaxPoolFormerModel as FlaxPoolFormerModel
    from poolformer_jax.weights.folder import write_model as write_model
    from poolformer_jax.weights.model_card import MODEL_CARD as MODEL_CARD
    from poolformer_jax.weights.names import LAYOUTS as LAYOUTS
    from poolformer_jax.weights.names import TRANSFORMS as TRANSFORMS
    from poolformer_jax.weights.names import Leaf as Leaf
    from poolformer_jax.weights.names import leaves as leaves
    from poolformer_jax.weights.pretrained import build_model as build_model
    from poolformer_jax.weights.pretrained import load_pretrained as load_pretrained
    from poolformer_jax.weights.pretrained import save_pretrained as save_pretrained
    from poolformer_jax.weights.published import class_names as class_names
    from poolformer_jax.weights.published import default_image_processor as default_image_processor
    from poolformer_jax.weights.source import CONFIG as CONFIG
    from poolformer_jax.weights.source import WEIGHTS as WEIGHTS
    from poolformer_jax.weights.source import ModelFiles as ModelFiles
    from poolformer_jax.weights.source import OpenedModel as OpenedModel
    from poolformer_jax.weights.source import find_model_files as find_model_files
    from poolformer_jax.weights.source import identify_model as identify_model
    from poolformer_jax.weights.source import open_model as open_model
    from poolformer_jax.weights.source import read_config as read_config
    from poolformer_jax.weights.transfer import ImportPlan as ImportPlan
    from poolformer_jax.weights.transfer import from_torch_state_dict as from_torch_state_dict
    from poolformer_jax.weights.transfer import to_torch_state_dict as to_torch_state_dict

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "containers.files": "WeightsFile WeightsFileError is_index open_weights",
        "containers.writers": "write_safetensors write_torch",
        "flax_models": "FlaxPoolFormerForImageClassification FlaxPoolFormerModel",
        "folder": "write_model",
        "model_card": "MODEL_CARD",
        "names": "LAYOUTS TRANSFORMS Leaf leaves",
        "pretrained": "build_model load_pretrained save_pretrained",
        "published": "class_names default_image_processor",
        "source": "CONFIG WEIGHTS ModelFiles OpenedModel find_model_files identify_model open_model read_config",
        "transfer": "ImportPlan from_torch_state_dict to_torch_state_dict",
    },
)

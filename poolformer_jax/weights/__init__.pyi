from .containers.files import (
    WeightsFile as WeightsFile,
    WeightsFileError as WeightsFileError,
    is_index as is_index,
    open_weights as open_weights,
)
from .containers.writers import write_safetensors as write_safetensors, write_torch as write_torch
from .flax_models import (
    FlaxPoolFormerForImageClassification as FlaxPoolFormerForImageClassification,
    FlaxPoolFormerModel as FlaxPoolFormerModel,
)
from .folder import write_model as write_model
from .model_card import MODEL_CARD as MODEL_CARD
from .model_files import (
    WEIGHTS as WEIGHTS,
    ModelFiles as ModelFiles,
    find_model_files as find_model_files,
)
from .names import LAYOUTS as LAYOUTS, TRANSFORMS as TRANSFORMS, Leaf as Leaf, leaves as leaves
from .pretrained import (
    build_model as build_model,
    load_pretrained as load_pretrained,
    save_pretrained as save_pretrained,
)
from .published import class_names as class_names, default_image_processor as default_image_processor
from .source import (
    OpenedModel as OpenedModel,
    identify_model as identify_model,
    open_model as open_model,
    read_config as read_config,
)
from .transfer import (
    from_torch_state_dict as from_torch_state_dict,
    to_torch_state_dict as to_torch_state_dict,
)

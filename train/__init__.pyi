from .config import (
    FreshNetwork as FreshNetwork,
    MeshConfig as MeshConfig,
    OptimizerConfig as OptimizerConfig,
    PretrainedNetwork as PretrainedNetwork,
    TrainConfig as TrainConfig,
    read_recipe_file as read_recipe_file,
)
from .data import (
    DataConfig as DataConfig,
    DeviceAugmentation as DeviceAugmentation,
    HostAugmentation as HostAugmentation,
)
from .loop import Outcome as Outcome, fit as fit
from .recipes import RECIPES as RECIPES

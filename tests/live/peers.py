"""The PyTorch homes of PoolFormer, imported as they are where they are installed."""

import importlib
import importlib.util
import os
import sys
import types
from pathlib import Path

from golden.fixture_values import parameter


class _Anything(type):
    """A class with every attribute that is asked for (the members of torchvision's InterpolationMode)."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Stub(types.ModuleType):
    """A module in which every name is a class. timm needs torchvision's names to import, and none of them to run."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        created = _Anything(name, (), {})
        setattr(self, name, created)
        return created


def _import_beside(name, stubs):
    """Imports `name` with stand-ins for modules that are not installed, which are taken away again."""
    standing_in = {stub: _Stub(stub) for stub in stubs if stub.split(".")[0] not in sys.modules}
    sys.modules.update(standing_in)
    for stub, module in standing_in.items():
        parent, _, child = stub.rpartition(".")
        if parent:
            setattr(standing_in[parent], child, module)
    try:
        return importlib.import_module(name)
    finally:
        for stub in standing_in:
            del sys.modules[stub]


def timm():
    """timm, also without torchvision."""
    if importlib.util.find_spec("torchvision"):
        return importlib.import_module("timm")
    below = ("", ".datasets", ".models", ".models.feature_extraction", ".ops", ".ops.misc", ".transforms", ".utils")
    functional = ("torchvision.transforms.functional", "torchvision.transforms.v2")
    return _import_beside("timm", [f"torchvision{name}" for name in below] + list(functional))


def small_metaformer(**sizes):
    """timm's MetaFormer with the arguments of its poolformer_s12, and other sizes."""
    metaformer = timm().models.metaformer
    return metaformer.MetaFormer(
        downsample_norm=None,
        mlp_act=importlib.import_module("torch").nn.GELU,
        mlp_bias=True,
        norm_layers=metaformer.GroupNorm1,
        layer_scale_init_values=1e-5,
        res_scale_init_values=None,
        use_mlp_head=False,
        **sizes,
    )


def fill(model, prefix=""):
    """Gives every parameter the value that its name stands for, which moves the output; the model in eval mode."""
    torch = importlib.import_module("torch")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    values = {name: torch.from_numpy(parameter(prefix + name, shape)) for name, shape in shapes.items()}
    model.load_state_dict(values, strict=True)
    return model.eval()


def sail_source():
    """The folder of a checkout of sail-sg/poolformer; None if SAIL_POOLFORMER does not name one."""
    folder = os.environ.get("SAIL_POOLFORMER")
    return Path(folder) if folder else None


def sail(module):
    """`models/poolformer.py` or `models/metaformer.py` of that checkout, which was written for timm 0.4."""
    layers = importlib.import_module("timm.layers") if "timm" in sys.modules else timm().layers
    helpers = types.ModuleType("timm.models.layers.helpers")
    helpers.to_2tuple = layers.to_2tuple
    old_layers = types.ModuleType("timm.models.layers")
    old_layers.DropPath, old_layers.trunc_normal_ = layers.DropPath, layers.trunc_normal_
    registry = types.ModuleType("timm.models.registry")
    registry.register_model = lambda function: function  # timm's own models keep their names
    replaced = {m.__name__: m for m in (helpers, old_layers, registry)}
    before = {name: sys.modules.get(name) for name in replaced}
    sys.modules.update(replaced)
    # A package of that folder, so that its modules find each other, under a name of its own.
    package = types.ModuleType("sail_models")
    package.__path__ = [str(sail_source() / "models")]
    sys.modules.setdefault("sail_models", package)
    try:
        return importlib.import_module(f"sail_models.{module}")
    finally:
        for name, old in before.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old

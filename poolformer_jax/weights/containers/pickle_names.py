"""What the names in a PyTorch pickle stand for: tensors, containers, and what holds no weights.

Nothing is looked up in Python and nothing is called but the constructors of `_CONSTRUCTORS`, which are functions of
this file. Everything else is refused by name.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from poolformer_jax.weights.containers.storage import (
    DTYPES,
    MAX_DIMENSIONS,
    Storage,
    StoredTensor,
    WeightsFileError,
    plain,
)


@dataclass(frozen=True, eq=False)
class StorageType:
    """A class such as `torch.FloatStorage`, and the type of the numbers in it."""

    dtype: np.dtype[Any]


class Inert:
    """Stands for a harmless object that holds no weights (training arguments, a scalar of NumPy). It keeps nothing."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __repr__(self) -> str:
        return "an object"


@dataclass(frozen=True, eq=False)
class Global:
    """A name that a pickle asked for, with what this machine does in its place."""

    name: str
    construct: Callable[..., Any]


# Constructors copy nothing of a length that the file chooses: a pickle can call one a million times with one argument.
def _ordered_dict() -> dict[Any, Any]:
    return {}


def _tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = None,
    hooks: Any = None,
    metadata: Any = None,
) -> StoredTensor:
    # Of what follows the strides only the metadata can say anything about the values.
    if isinstance(metadata, dict) and (views := [name for name in ("neg", "conj") if metadata.get(name)]):
        raise WeightsFileError(
            f"it holds a tensor as a view that PyTorch computes when it is used ({views[0]}), and not its values. Save "
            "tensor.resolve_neg().resolve_conj() of every one"
        )
    if not (isinstance(storage, Storage) and isinstance(size, tuple) and isinstance(stride, tuple)):
        raise WeightsFileError("it builds a tensor of something else than a storage and its sizes")
    return StoredTensor(storage, size, stride, offset)


def _parameter(data: Any, *_: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise WeightsFileError("it builds a parameter of something else than a tensor")
    return data


def _size(sizes: Any) -> tuple[Any, ...]:
    if not isinstance(sizes, list | tuple) or len(sizes) > MAX_DIMENSIONS:
        raise WeightsFileError("it builds a size of something else than a few numbers")
    return tuple(sizes)


# torch.float32, torch.float8_e4m3fn, torch.quint4x2, ...
_DTYPE = re.compile(r"torch\.(bool|bfloat16|(u?int|float|complex|bits|qu?int)\d\w*)")
_BUILTINS = ("set", "frozenset", "complex", "bytearray")
_CONSTRUCTORS: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": _size,
    "collections.OrderedDict": _ordered_dict,
    # What checkpoints of timm and sail's training hold beside the weights: arguments, metrics, paths, optimizer state.
    "argparse.Namespace": Inert,
    "types.SimpleNamespace": Inert,
    "collections.defaultdict": Inert,
    "collections.Counter": Inert,
    "pathlib.Path": Inert,
    "pathlib.PosixPath": Inert,
    "pathlib.WindowsPath": Inert,
    "pathlib._local.PosixPath": Inert,
    "pathlib._local.WindowsPath": Inert,
    "numpy.dtype": Inert,
    "numpy.ndarray": Inert,
    "numpy.core.multiarray.scalar": Inert,
    "numpy.core.multiarray._reconstruct": Inert,
    "numpy._core.multiarray.scalar": Inert,
    "numpy._core.multiarray._reconstruct": Inert,
    "_codecs.encode": Inert,
    "torch.device": Inert,
    "torch.serialization._get_layout": Inert,
    "torch.torch_version.TorchVersion": Inert,
    **{f"{module}.{name}": Inert for module in ("builtins", "__builtin__") for name in _BUILTINS},
}
_STORAGE_TYPES = {f"torch.{name}": StorageType(dtype) for name, _, dtype in DTYPES}


def look_up(name: str) -> Global | StorageType:
    """What a name that a pickle asks for stands for.

    Raises:
        WeightsFileError: if it is neither a tensor nor a container.
    """
    if name in _STORAGE_TYPES:
        return _STORAGE_TYPES[name]
    if _DTYPE.fullmatch(name):
        return Global(name, Inert)
    if name not in _CONSTRUCTORS:
        raise WeightsFileError(
            f"its pickle asks for {plain(name)}, which is neither a tensor nor a container. Nothing was run. If you "
            "trust the file, load it with PyTorch and save model.state_dict() alone"
        )
    return Global(name, _CONSTRUCTORS[name])

"""What each name in a PyTorch pickle is replaced with.

No name is looked up in Python. Only the constructors in `_CONSTRUCTORS`, functions of this file, are called; any other
name is an error.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from poolformer_jax.fields import printable
from poolformer_jax.weights.containers.storage import (
    DTYPES,
    MAX_DIMENSIONS,
    Storage,
    StoredTensor,
    WeightsFileError,
)


@dataclass(frozen=True, eq=False)
class StorageType:
    """A class such as `torch.FloatStorage`, with the type of its numbers."""

    dtype: np.dtype[Any]


class Inert:
    """Replaces a harmless object without weights (training arguments, a NumPy scalar). It keeps nothing."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __repr__(self) -> str:
        return "an object"


@dataclass(frozen=True, eq=False)
class Global:
    """A name in a pickle, and the constructor that is called instead."""

    name: str
    construct: Callable[..., Any]


# Constructors copy nothing whose length the file chooses: a pickle can call one a million times with one argument.
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
    # Of the arguments after the strides only the metadata can change the values.
    if isinstance(metadata, dict) and (views := [name for name in ("neg", "conj") if metadata.get(name)]):
        raise WeightsFileError(
            f"it has a tensor that is a lazy view ({views[0]}), without its values. Save "
            "tensor.resolve_neg().resolve_conj() of every tensor"
        )
    if not (isinstance(storage, Storage) and isinstance(size, tuple) and isinstance(stride, tuple)):
        raise WeightsFileError("it builds a tensor from something other than a storage and sizes")
    return StoredTensor(storage, size, stride, offset)


def _parameter(data: Any, *_: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise WeightsFileError("it builds a parameter from something other than a tensor")
    return data


def _size(sizes: Any) -> tuple[Any, ...]:
    if not isinstance(sizes, list | tuple) or len(sizes) > MAX_DIMENSIONS:
        raise WeightsFileError("it builds a size from something other than a few numbers")
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
    # Other contents of timm's and sail's training checkpoints: arguments, metrics, paths, optimizer state.
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
    """The replacement of a name in a pickle.

    Raises:
        WeightsFileError: if it is neither a tensor nor a container.
    """
    if name in _STORAGE_TYPES:
        return _STORAGE_TYPES[name]
    if _DTYPE.fullmatch(name):
        return Global(name, Inert)
    if name not in _CONSTRUCTORS:
        raise WeightsFileError(
            f"its pickle needs {printable(name)}, which is neither a tensor nor a container. Nothing was run. If you "
            "trust the file, load it with PyTorch and save model.state_dict() alone"
        )
    return Global(name, _CONSTRUCTORS[name])

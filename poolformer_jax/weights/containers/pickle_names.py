"""What each name in a PyTorch pickle is replaced with.

No name is looked up in Python. Only the constructors in `_CONSTRUCTORS`, functions of this file, are called. Any other
name becomes a constructor of `Inert` objects, which keep nothing of what the file says about them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from poolformer_jax.weights.containers.storage import (
    DTYPES,
    MAX_DIMENSIONS,
    PickledStorage,
    Storage,
    StoredTensor,
    WeightsFileError,
    contiguous_strides,
    describe_view,
)


@dataclass(frozen=True, eq=False)
class StorageType:
    """A class such as `torch.FloatStorage`, with the type of its numbers."""

    dtype: np.dtype[Any]


@dataclass(frozen=True, eq=False)
class Inert:
    """Replaces an object that is no weight (training arguments, a logger's history). It keeps only the name."""

    name: str = ""  # the class or function that the file names; empty for Python's own containers

    def __repr__(self) -> str:
        return "an object"


@dataclass(eq=False, repr=False)  # repr() of a hostile shape would not end
class PickledDtype:
    """A NumPy type. The pickle sets the byte order after it has created the type."""

    code: str
    order: str = "|"

    def set_state(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.order = state[1]

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """The type; None if arrays of it are no weights."""
        plain = _NUMPY_TYPES.get(self.code)
        return None if plain is None else plain.newbyteorder("<" if self.order == "|" else self.order)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class EncodedText:
    """The bytes of an array in pickle protocol 2: a text that is to be encoded. Encoded when the array is read."""

    text: str


@dataclass(eq=False, repr=False)  # repr() of a hostile shape would not end
class PickledArray:
    """A NumPy array. The pickle sets shape, type and numbers after it has created the array."""

    shape: Any = None
    type: Any = None
    content: Any = None
    fortran: bool = False

    def set_state(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 5:
            _, self.shape, self.type, fortran, self.content = state
            self.fortran = fortran is True

    def tensor(self, path: Path) -> StoredTensor | None:
        """The array as a tensor of the file `path`; None if it does not hold numbers.

        Raises WeightsFileError if shape, type and bytes do not fit each other.
        """
        dtype = self.type.dtype if isinstance(self.type, PickledDtype) else None
        content = self.content.text if isinstance(self.content, EncodedText) else self.content
        if dtype is None or not isinstance(content, bytes | bytearray | str) or not isinstance(self.shape, tuple):
            return None
        if len(self.shape) > MAX_DIMENSIONS or any(type(size) is not int or size < 0 for size in self.shape):
            raise WeightsFileError("it has a NumPy array whose shape is not a few numbers of 0 or more")
        count = math.prod(self.shape)
        if len(content) != count * dtype.itemsize:
            raise WeightsFileError(f"it has a NumPy array whose {len(content)} bytes are not those of its shape")
        strides = contiguous_strides(self.shape[::-1])[::-1] if self.fortran else contiguous_strides(self.shape)
        return StoredTensor(PickledStorage(path, dtype, count, content=content), self.shape, strides)


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
    given = describe_view(size, stride, offset)
    if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
        raise WeightsFileError(f"it has {given}, which is not a tensor's shape")
    if any(type(number) is not int or not 0 <= number < 1 << 62 for number in (*size, *stride, offset)):
        raise WeightsFileError(f"it has {given}: expected integers of 0 or more")
    return StoredTensor(storage, size, stride, offset)


def _parameter(data: Any, *_: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise WeightsFileError("it builds a parameter from something other than a tensor")
    return data


def _size(sizes: Any) -> tuple[Any, ...]:
    if not isinstance(sizes, list | tuple) or len(sizes) > MAX_DIMENSIONS:
        raise WeightsFileError("it builds a size from something other than a few numbers")
    return tuple(sizes)


def _numpy_dtype(code: Any, *_: Any) -> PickledDtype:
    return PickledDtype(code if isinstance(code, str) else "")


def _numpy_array(*_: Any) -> PickledArray:
    return PickledArray()


def _numpy_from_buffer(content: Any, dtype: Any, shape: Any, order: Any = "C", *_: Any) -> PickledArray:
    return PickledArray(shape, dtype, content, order == "F")


def _numpy_scalar(dtype: Any, content: Any = None, *_: Any) -> PickledArray:
    return PickledArray((), dtype, content)


def _encoded(text: Any, *_: Any) -> Any:
    return EncodedText(text) if isinstance(text, str) else Inert("_codecs.encode")


_CONSTRUCTORS: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": _size,
    "collections.OrderedDict": _ordered_dict,
    "numpy.dtype": _numpy_dtype,
    **{
        f"numpy.{core}.{name}": construct
        for core in ("core", "_core")  # before NumPy 2, and since
        for name, construct in (
            ("multiarray._reconstruct", _numpy_array),
            ("multiarray.scalar", _numpy_scalar),
            ("numeric._frombuffer", _numpy_from_buffer),
        )
    },
    "_codecs.encode": _encoded,
    "__builtin__.bytes": lambda *arguments: Inert("bytes") if arguments else b"",  # protocol 2's empty bytes
}
_STORAGE_TYPES = {f"torch.{name}": StorageType(dtype) for name, _, dtype in DTYPES}
# NumPy's own types, by the code in a pickle: f4, i8, b1, ...
_NUMPY_TYPES = {dtype.str[1:]: dtype for name, _, dtype in DTYPES if name != "BFloat16Storage"}


def look_up(name: str) -> Global | StorageType:
    """The replacement of a name in a pickle."""
    if name in _STORAGE_TYPES:
        return _STORAGE_TYPES[name]
    return Global(name, _CONSTRUCTORS.get(name) or (lambda *_, **__: Inert(name)))

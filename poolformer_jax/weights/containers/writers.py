"""Writes weights files one array at a time: safetensors, and the zip archive of `torch.save`, without PyTorch.

The `safetensors` library needs all arrays in memory at once. Here each array is requested when it is written and then
released, so that a conversion needs the memory of one array. Sources: the format section of the safetensors README;
torch/serialization.py, `_save`.
"""

import json
import math
import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from poolformer_jax.errors import InputError
from poolformer_jax.weights.containers.storage import contiguous_strides

# Files are written in the type of the parameter tree.
_DTYPE = np.dtype("<f4")
Names = Sequence[tuple[str, tuple[int, ...]]]


def write_safetensors(
    path: Path, names: Names, arrays: Iterable[np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file.

    `names` has the name and shape of every array, in the order of `arrays`.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, shape in names:
        end = begin + math.prod(shape) * _DTYPE.itemsize
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the numbers begin at a multiple of eight
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for array in _checked(names, arrays):
            file.write(array.data)


def write_torch(path: Path, names: Names, arrays: Iterable[np.ndarray]) -> None:
    """Writes a state dict as `torch.save` does; `torch.load` reads it, with weights_only too.

    `names` has the name and shape of every array, in the order of `arrays`.
    """
    root = path.name.split(".")[0]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{root}/data.pkl", _state_dict_pickle(names))
        archive.writestr(f"{root}/byteorder", b"little")
        for key, array in enumerate(_checked(names, arrays)):
            archive.writestr(f"{root}/data/{key}", array.data)
        archive.writestr(f"{root}/version", b"3\n")


def _checked(names: Names, arrays: Iterable[np.ndarray]) -> Iterable[np.ndarray]:
    """The bytes of each array; ValueError if there are too few or too many, InputError for a wrong shape."""
    for (name, shape), array in zip(names, arrays, strict=True):
        if array.shape != shape:
            raise InputError(f"{name} has shape {array.shape}. Expected {shape}, as in the header.")
        yield np.ascontiguousarray(array, _DTYPE).reshape(-1).view(np.uint8)


def _state_dict_pickle(names: Names) -> bytes:
    """The pickle (protocol 2) of an OrderedDict from names to tensors, each with a separate storage."""
    rebuild, ordered = _global("torch._utils", "_rebuild_tensor_v2"), _global("collections", "OrderedDict") + b")R"
    items = []
    for key, (name, shape) in enumerate(names):
        parts = [_text("storage"), _global("torch", "FloatStorage"), _text(str(key)), _text("cpu")]
        storage = _tuple(*parts, _integer(math.prod(shape))) + b"Q"
        sizes = _tuple(*map(_integer, shape)) + _tuple(*map(_integer, contiguous_strides(shape)))
        # offset 0, sizes, strides, requires_grad=False, no hooks
        items.append(_text(name) + rebuild + b"(" + storage + _integer(0) + sizes + b"\x89" + ordered + b"tR")
    return b"\x80\x02" + ordered + b"(" + b"".join(items) + b"u."


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value) if value < 1 << 31 else b"\x8a\x08" + struct.pack("<q", value)


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"

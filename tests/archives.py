"""Builds files in the format of `torch.save` byte by byte, so that a test can damage any byte."""

import pickle
import struct
import zipfile
from collections.abc import Mapping

import numpy as np


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def integer(value: int) -> bytes:
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def tuple_of(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def dict_of(items: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def name_of(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + tuple_of(*arguments) + b"R"


def storage(key: str, count: int, kind: str = "FloatStorage") -> bytes:
    parts = (text("storage"), name_of("torch", kind), text(key), text("cpu"), integer(count))
    return tuple_of(*parts) + b"Q"


def tensor(stored: bytes, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> bytes:
    sizes, steps = tuple_of(*map(integer, shape)), tuple_of(*map(integer, strides))
    hooks = call(name_of("collections", "OrderedDict"))
    rebuild = name_of("torch._utils", "_rebuild_tensor_v2")
    return call(rebuild, stored, integer(offset), sizes, steps, b"\x89", hooks)


def program(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def zip_archive(path, pickled: bytes, storages: Mapping[str, bytes], compression=zipfile.ZIP_STORED, order=b"little"):
    """Writes a zip archive like `torch.save`; returns the path. Before PyTorch 2.1, `order` was not recorded."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        if order is not None:
            archive.writestr("archive/byteorder", order)
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key}", content)
        archive.writestr("archive/version", b"3\n")
    return path


def one_tensor(path, shape=(2, 3), strides=(3, 1), offset=0, count=6, stored=6):
    """An archive with a float32 tensor "weight", a view of `count` numbers of which only `stored` are in the file."""
    pickled = program(dict_of({"weight": tensor(storage("0", count), shape, strides, offset)}))
    return zip_archive(path, pickled, {"0": np.arange(stored, dtype=np.float32).tobytes()})


def checkpoint(path, content, protocol=2):
    """An archive with any picklable object. NumPy arrays replace tensors; both are read in the same way."""
    return zip_archive(path, pickle.dumps(content, protocol), {})

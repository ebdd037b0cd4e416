"""Tensors that are still in their file: where they are, and how to read one without the others."""

import io
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from poolformer_jax.errors import InputError
from poolformer_jax.messages import short_repr

# PyTorch's name of a type, safetensors' name, and NumPy's type.
DTYPES: tuple[tuple[str, str, np.dtype[Any]], ...] = (
    ("FloatStorage", "F32", np.dtype(np.float32)),
    ("HalfStorage", "F16", np.dtype(np.float16)),
    ("BFloat16Storage", "BF16", np.dtype(ml_dtypes.bfloat16)),
    ("DoubleStorage", "F64", np.dtype(np.float64)),
    ("LongStorage", "I64", np.dtype(np.int64)),
    ("IntStorage", "I32", np.dtype(np.int32)),
    ("ShortStorage", "I16", np.dtype(np.int16)),
    ("CharStorage", "I8", np.dtype(np.int8)),
    ("ByteStorage", "U8", np.dtype(np.uint8)),
    ("BoolStorage", "BOOL", np.dtype(np.bool_)),
)
MAX_DIMENSIONS = 32  # no parameter has more than four
# Most bytes of a pickle, an archive's directory or a JSON header, which take about twenty times as much in memory. m48
# with optimizer state and moving average has under 1 MiB.
MAX_STRUCTURE = 1 << 24


class WeightsFileError(InputError):
    """A weights file that is damaged, hostile, or of an unknown kind. Nothing in it was run."""


class BoundedReader:
    """A binary file that never reads more than `limit` bytes at once.

    `zipfile` and `pickletools` read the length that a file claims, and a buffered file allocates it first.
    """

    def __init__(self, file: io.BufferedIOBase, limit: int = MAX_STRUCTURE) -> None:
        self._file, self._limit = file, limit
        begin = file.tell()
        self._end = file.seek(0, io.SEEK_END)
        file.seek(begin)

    def read(self, size: int = -1) -> bytes:
        left = max(self._end - self._file.tell(), 0)
        wanted = left if size < 0 else size
        if wanted > self._limit:
            raise WeightsFileError(f"part of its structure claims {wanted} bytes, more than {self._limit}")
        return self._file.read(min(wanted, left))

    def readline(self) -> bytes:
        return self._file.readline(self._limit)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


@dataclass(eq=False)
class Storage:
    """A contiguous block of numbers in a file."""

    path: Path
    dtype: np.dtype[Any]  # type of the numbers, with their byte order
    count: int  # number of elements
    position: int = -1  # byte of the file at which they begin; -1 until it is known (the legacy format stores it last)
    checksum: int | None = None  # their CRC-32; None if the file has none

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    def read(self, first: int, count: int) -> np.ndarray:
        """The bytes of `count` numbers, from number `first` on."""
        size = count * self.dtype.itemsize
        try:
            data = np.fromfile(self.path, np.uint8, size, offset=self.position + first * self.dtype.itemsize)
        except OSError as error:
            raise WeightsFileError(
                f"{self.path} can no longer be read: {error.strerror or error}. Expected the file to stay in place."
            ) from error
        if data.size != size:
            raise WeightsFileError(
                f"{self.path} became shorter while it was read. Expected the file to stay unchanged."
            )
        if count == self.count and self.checksum is not None and zlib.crc32(data.data) != self.checksum:
            raise WeightsFileError(
                f"{self.path} is damaged: the {self.nbytes} bytes from byte {self.position} do not match "
                "their checksum. Copy or download the file again."
            )
        return data


@dataclass(eq=False)
class PickledStorage(Storage):
    """The numbers of a NumPy array, which a pickle contains itself."""

    # Their bytes. Pickle protocol 2 writes them as a text with one character for each byte.
    content: bytes | bytearray | str = b""

    def read(self, first: int, count: int) -> np.ndarray:
        itemsize = self.dtype.itemsize
        part = self.content[first * itemsize : (first + count) * itemsize]
        try:
            return np.frombuffer(part.encode("latin-1") if isinstance(part, str) else bytes(part), np.uint8)
        except UnicodeEncodeError as error:
            raise WeightsFileError(f"{self.path} is damaged: a NumPy array in it has characters for bytes.") from error


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a file. `numpy.asarray` reads it, without the rest of the file.

    Raises WeightsFileError if it extends outside the storage, or uses the same number twice.
    """

    storage: Storage  # the numbers that it is a view of
    shape: tuple[int, ...]  # its sizes
    strides: tuple[int, ...]  # distance of neighbours along each dimension, in elements
    offset: int = 0  # index of its first element in the storage

    def __post_init__(self) -> None:
        given = describe_view(self.shape, self.strides, self.offset)
        if self.span and self.offset + self.span > self.storage.count:
            raise WeightsFileError(f"it has {given}, outside its {self.storage.count} stored numbers")
        reach = 0  # distance from the first to the last element along the dimensions visited so far
        for stride, size in sorted((stride, size) for size, stride in zip(self.shape, self.strides) if size > 1):
            if self.span and stride <= reach:
                raise WeightsFileError(f"it has {given}, whose strides overlap: it would be larger than its storage")
            reach += stride * (size - 1)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type in the file."""
        return self.storage.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def span(self) -> int:
        """Number of elements of the storage from its first to its last element, inclusive; 0 if it is empty."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides))

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise InputError("A tensor in a file cannot become an array without a copy. Leave out copy=False.")
        array = self._read()
        return array if dtype is None else array.astype(dtype, copy=False)

    def _read(self) -> np.ndarray:
        itemsize = self.dtype.itemsize
        data = self.storage.read(self.offset, self.span)
        flat = data.view(self.dtype)
        if self.strides == contiguous_strides(self.shape):
            array = flat.reshape(self.shape)
        else:
            strides = [stride * itemsize for stride in self.strides]
            array = np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)
        return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def describe_view(shape: Any, strides: Any, offset: Any) -> str:
    """What a file says of a tensor, for messages."""
    return f"a tensor of shape {short_repr(shape)}, strides {short_repr(strides)} and offset {short_repr(offset)}"


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a C-contiguous array."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides[: len(shape)]))

"""The two containers of `torch.save`: the zip archive (PyTorch 1.6 and later) and the legacy stream before it.

Both contain a pickle with the structure, and storages with the numbers. Only the structure is read here; the numbers
stay in the file until a tensor is read. Sources: torch/serialization.py (`_legacy_save`, `_save`, `_legacy_load`) and
caffe2/serialize/inline_container.cc (the zip archive's records).
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from poolformer_jax.messages import short_repr
from poolformer_jax.weights.containers import pickles
from poolformer_jax.weights.containers.pickle_names import StorageType
from poolformer_jax.weights.containers.storage import MAX_STRUCTURE, BoundedReader, Storage, WeightsFileError

ZIP_MAGIC = b"PK\x03\x04"
# The pickle of torch.serialization.MAGIC_NUMBER, without the protocol (and, from protocol 4, the frame) before it.
LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."

_ByteOrder = Literal["<", ">"]
_BYTE_ORDERS: Mapping[bytes, _ByteOrder] = {b"little": "<", b"big": ">"}
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., length of the name, length of the extra field


def read_zip(path: Path, file: io.BufferedIOBase, size: int) -> Any:
    """Reads the object in a zip archive of `torch.save`; its tensors stay in the file.

    Raises WeightsFileError if the archive is damaged, compressed, or not written by `torch.save`.
    """
    records = _records(file)
    pickled = [name for name in records if name.endswith("/data.pkl")]
    if len(pickled) != 1:
        raise WeightsFileError("it is a zip archive without a data.pkl; torch.save writes exactly one")
    root = pickled[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in records:
        raise WeightsFileError("it is a TorchScript program. Save the state dict of the model it was made from")
    order = _byte_order(file, records.get(f"{root}byteorder"), size)
    storages: dict[str, Storage] = {}

    def storage(reference: tuple[Any, ...]) -> Storage:
        key, declared = _reference(path, reference, order)
        record = records.get(f"{root}data/{key}")
        if record is None:
            raise WeightsFileError(
                f"its pickle refers to the storage {short_repr(key)}, which the archive does not have"
            )
        declared.position = _position(file, record, size)
        declared.checksum = _checksum(record)
        if record.file_size != declared.nbytes:
            raise WeightsFileError(
                f"its storage {short_repr(key)} has {record.file_size} bytes, and its pickle declares {declared.count} "
                f"numbers of type {declared.dtype.name}, {declared.nbytes} bytes"
            )
        return _same(storages, key, declared)

    # NumPy arrays are inside the pickle, which may then be as large as the weights.
    content = _read_record(file, records[pickled[0]], size, limit=size)
    return pickles.load(BoundedReader(io.BytesIO(content), max(len(content), MAX_STRUCTURE)), path, storage)


def read_legacy(path: Path, file: io.BufferedIOBase, size: int) -> Any:
    """Reads the object in a legacy stream of `torch.save`; its tensors stay in the file.

    Raises WeightsFileError if the stream is damaged.
    """
    stream = BoundedReader(file)
    storages: dict[str, Storage] = {}

    def storage(reference: tuple[Any, ...]) -> Storage:
        key, declared = _reference(path, reference, "<")  # legacy files are always little-endian
        if len(reference) > 5 and reference[5] is not None:
            raise WeightsFileError(
                "it has views of storages, a format from before PyTorch 0.4. Save it again with a later version"
            )
        return _same(storages, key, declared)

    def no_storage(reference: tuple[Any, ...]) -> Storage:
        raise WeightsFileError("it refers to a storage before its state dict")

    pickles.load(stream, path, no_storage)  # the magic number, which the caller has checked
    if (version := pickles.load(stream, path, no_storage)) != 1001:
        raise WeightsFileError(f"its legacy format has version {short_repr(version)}, expected 1001")
    pickles.load(stream, path, no_storage)  # byte order and type sizes of the machine, without effect on the file
    result = pickles.load(stream, path, storage)
    keys = pickles.load(stream, path, no_storage)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(storages):
        raise WeightsFileError("the storages after its pickle are not the ones that the pickle refers to")
    for key in keys:
        _locate(file, storages[key], size)
    return result


def _byte_order(file: io.BufferedIOBase, record: zipfile.ZipInfo | None, size: int) -> _ByteOrder:
    if record is None:
        return "<"
    if (order := _BYTE_ORDERS.get(_read_record(file, record, size))) is None:
        raise WeightsFileError("its record 'byteorder' is neither 'little' nor 'big'")
    return order


def _records(file: io.BufferedIOBase) -> dict[str, zipfile.ZipInfo]:
    """The archive's directory. BoundedReader limits it, because `zipfile` reads the length that the archive claims."""
    try:
        with zipfile.ZipFile(BoundedReader(file)) as archive:
            found = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, struct.error, NotImplementedError, EOFError) as error:
        if isinstance(error, WeightsFileError):
            raise
        raise WeightsFileError(f"its zip archive is damaged ({error}): the file is truncated or was altered") from error
    records = {record.filename: record for record in found}
    if len(records) != len(found):
        raise WeightsFileError("its zip archive has two records of the same name")
    return records


def _position(file: io.BufferedIOBase, record: zipfile.ZipInfo, size: int) -> int:
    """The byte at which a record's content begins. Raises unless the content is uncompressed and complete."""
    name = short_repr(record.filename)
    if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1 or record.compress_size != record.file_size:
        raise WeightsFileError(f"its record {name} is compressed or encrypted, and torch.save does neither")
    # zipfile computes a negative offset for an archive that lost bytes in the middle.
    file.seek(max(record.header_offset, 0))
    header = file.read(_LOCAL_HEADER.size)
    if record.header_offset < 0 or len(header) < _LOCAL_HEADER.size or not header.startswith(ZIP_MAGIC):
        raise WeightsFileError(f"its record {name} is not where the archive's directory places it")
    _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    position: int = record.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if position + record.file_size > size:
        raise WeightsFileError(f"its record {name} ends after the file does")
    return position


def _checksum(record: zipfile.ZipInfo) -> int | None:
    # torch.serialization.set_crc32_options(False) writes zero.
    return record.CRC or None


def _read_record(file: io.BufferedIOBase, record: zipfile.ZipInfo, size: int, limit: int = MAX_STRUCTURE) -> bytes:
    position = _position(file, record, size)
    file.seek(position)
    content = BoundedReader(file, limit).read(record.file_size)
    if (checksum := _checksum(record)) is not None and zlib.crc32(content) != checksum:
        raise WeightsFileError(f"its record {short_repr(record.filename)} is damaged: the checksum differs")
    return content


def _reference(path: Path, reference: tuple[Any, ...], order: _ByteOrder) -> tuple[str, Storage]:
    """The storage that a persistent id describes: ("storage", type, key, location, number of elements, ...)."""
    if len(reference) < 5 or reference[0] != "storage":
        raise WeightsFileError("its pickle refers to something outside of it that is not a storage")
    _, kind, key, _, count = reference[:5]
    if not (isinstance(kind, StorageType) and isinstance(key, str) and type(count) is int):
        raise WeightsFileError("its pickle refers to a storage without a type, a name and a length")
    if not 0 <= count < 1 << 60:
        raise WeightsFileError(f"its storage {short_repr(key)} claims {short_repr(count)} numbers")
    return key, Storage(path, kind.dtype.newbyteorder(order), count)


def _same(storages: dict[str, Storage], key: str, declared: Storage) -> Storage:
    """The storage with the key `key`. Tensors that share one must declare it alike."""
    known = storages.setdefault(key, declared)
    if (known.dtype, known.count) != (declared.dtype, declared.count):
        raise WeightsFileError(f"its pickle declares the storage {short_repr(key)} in two ways")
    return known


def _locate(file: io.BufferedIOBase, storage: Storage, size: int) -> None:
    """Sets the position of a legacy storage: eight bytes with the number of its elements, then the elements."""
    prefix = file.read(8)
    count = int.from_bytes(prefix, "little")
    storage.position = file.tell()
    if len(prefix) < 8 or storage.position + storage.nbytes > size:
        raise WeightsFileError("it ends before the numbers of its tensors: the file is truncated")
    if count != storage.count:
        raise WeightsFileError(f"a storage in it has {count} numbers where its pickle declares {storage.count}")
    file.seek(storage.position + storage.nbytes)

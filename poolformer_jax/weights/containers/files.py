"""Opens weights files of any container without PyTorch, and without running anything that they contain.

safetensors (one file, or shards with an index) through the `safetensors` library; `torch.save` files through
`torch_files.py` and `checkpoint.py`. The first bytes decide the container, not the file's name. Tensors stay in the
file until they are read, and every size that a file claims is compared with the file's real size before memory is
allocated.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from poolformer_jax.errors import InputError, MissingFileError
from poolformer_jax.files import read_json
from poolformer_jax.messages import first_few, printable, short_repr
from poolformer_jax.weights.containers import torch_files
from poolformer_jax.weights.containers.checkpoint import find_state_dict
from poolformer_jax.weights.containers.ignore import names_to_read
from poolformer_jax.weights.containers.storage import (
    DTYPES,
    MAX_STRUCTURE,
    Storage,
    StoredTensor,
    WeightsFileError,
    contiguous_strides,
)

__all__ = ["StoredTensor", "WeightsFile", "WeightsFileError", "is_index", "open_weights", "read_index"]

_SAFETENSORS_DTYPES = {name: dtype for _, name, dtype in DTYPES}


@dataclass(frozen=True)
class WeightsFile:
    """An opened weights file: name, type and shape of every tensor. The numbers are still in the file."""

    path: Path  # the file, or the index of a sharded one
    container: str  # "safetensors", "sharded safetensors", "torch zip", "torch legacy", or "sharded torch"
    tensors: Mapping[str, StoredTensor]  # the state dict
    wrapping: str | None = None  # the checkpoint's key for the state dict; None if the file is the state dict itself
    # The network's name in a training checkpoint of timm or sail ("arch"); None if it has none.
    architecture: str | None = None
    has_ema: bool = False  # True if the checkpoint also has an exponential moving average of the weights
    others: tuple[str, ...] = ()  # the checkpoint's other keys (epoch, optimizer, ...)
    metadata: Mapping[str, str] = field(default_factory=dict)  # the metadata of a safetensors file
    files: tuple[Path, ...] = ()  # every file that was read

    @property
    def nbytes(self) -> int:
        """Bytes of the state dict's numbers."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_weights(path: str | Path, *, use_ema: bool = False, ignore: Sequence[str] = ()) -> WeightsFile:
    """Opens a weights file without reading its numbers.

    `ignore` has patterns ("criterion.*") of names to leave out, as in the shell. Raises MissingFileError if there is no
    such file; WeightsFileError if it is damaged, its pickle needs more than data, or it is not a weights file.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"There is no file {path}. Expected a weights file, or the index of a sharded one.")
    with _naming_file(path):
        opened = _open_index(path, use_ema) if is_index(path) else _open_one(path, use_ema, ignore)
        _check_total_size(opened)
    return replace(opened, tensors={name: opened.tensors[name] for name in names_to_read(opened.tensors, ignore)})


@contextmanager
def _naming_file(path: Path) -> Iterator[None]:
    """Puts the path before the message of a WeightsFileError; inside, messages begin with "it"."""
    try:
        yield
    except WeightsFileError as error:
        raise WeightsFileError(f"Cannot read the weights in {path}: {error}.") from error


def _open_one(path: Path, use_ema: bool, ignore: Sequence[str] = ()) -> WeightsFile:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(32)
        file.seek(0)
        _check_not_a_placeholder(start)
        if start.startswith(torch_files.ZIP_MAGIC):
            container, loaded = "torch zip", torch_files.read_zip(path, file, size)
        elif start.startswith(b"\x80") and torch_files.LEGACY_MAGIC in start:
            container, loaded = "torch legacy", torch_files.read_legacy(path, file, size)
        else:
            return _open_safetensors(path, start, use_ema)
    return WeightsFile(path, container, **find_state_dict(loaded, use_ema, ignore)._asdict(), files=(path,))


def _check_not_a_placeholder(start: bytes) -> None:
    """Names what failed downloads leave behind: an empty file, a Git LFS pointer, a web page."""
    if not start:
        raise WeightsFileError("it is empty")
    if start.startswith(b"version https:"):
        raise WeightsFileError("it is a Git LFS pointer, not the file. Run: git lfs pull")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise WeightsFileError("it is a web page. Download the file that the page links to")


def _open_safetensors(path: Path, start: bytes, use_ema: bool) -> WeightsFile:
    if start[8:9] != b"{" and path.suffix != ".safetensors":
        raise WeightsFileError(
            f"it begins with {start[:8]!r}, expected a safetensors file or one that torch.save wrote"
        )
    if use_ema:
        raise WeightsFileError("it is a safetensors file, which has no second set of weights. Leave out use_ema")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_STRUCTURE:
        raise WeightsFileError(f"its header claims {length} bytes, more than {MAX_STRUCTURE}")
    # The library checks that the header fits the file, and that tensors lie inside the file and do not overlap.
    try:
        with safe_open(path, framework="numpy") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsFileError(f"the safetensors library rejects it ({error}); it is truncated or damaged") from error
    with path.open("rb") as file:
        file.seek(8)
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if (dtype := _SAFETENSORS_DTYPES.get(entry["dtype"])) is None:
            raise WeightsFileError(f"its tensor {short_repr(name)} is of type {entry['dtype']}, which is not supported")
        shape = tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        storage = Storage(path, dtype.newbyteorder("<"), (end - begin) // dtype.itemsize, 8 + length + begin)
        tensors[name] = StoredTensor(storage, shape, contiguous_strides(shape))
    return WeightsFile(path, "safetensors", tensors, metadata=metadata, files=(path,))


def is_index(path: Path) -> bool:
    """True for the name of an index. transformers puts a variant into it: `model.safetensors.index.fp16.json`."""
    return ".index." in path.name and path.suffix == ".json"


def read_index(path: Path) -> dict[str, set[str]]:
    """The tensor names of every shard of an index, by the shard's file name.

    Raises WeightsFileError if it is not an index, or names a file outside its folder.
    """
    with _naming_file(path):
        return _read_index(path)


def _read_index(path: Path) -> dict[str, set[str]]:
    shards: dict[str, set[str]] = {}
    for name, shard in _weight_map(path).items():
        # Shards lie beside their index. A hostile index could name any file of this machine.
        if Path(shard).name != shard or "\\" in shard or shard in ("", ".", ".."):
            raise WeightsFileError(
                f"it places {short_repr(name)} in {short_repr(shard)}, expected the name of a file beside it"
            )
        shards.setdefault(shard, set()).add(name)
    return shards


def _open_index(path: Path, use_ema: bool) -> WeightsFile:
    """Opens all shards, and checks that each has exactly the names that the index places there."""
    tensors: dict[str, StoredTensor] = {}
    opened = [(_open_shard(path, shard, use_ema), names) for shard, names in sorted(_read_index(path).items())]
    for one, names in opened:
        if lost := sorted(names - one.tensors.keys()):
            raise WeightsFileError(f"it places {first_few(lost, 3)} in {one.path.name}, which does not have it")
        if extra := one.tensors.keys() - names:
            raise WeightsFileError(
                f"{one.path.name} has {first_few(sorted(extra), 3)}, which the index does not place there"
            )
        tensors |= one.tensors
    kinds = {one.container for one, _ in opened}
    container = "sharded safetensors" if kinds == {"safetensors"} else "sharded torch"
    return WeightsFile(path, container, tensors, files=(path, *(one.path for one, _ in opened)))


def _weight_map(path: Path) -> dict[str, str]:
    expected = "an index of a sharded file, JSON with a 'weight_map'"
    try:
        weight_map = read_json(path, expected)["weight_map"]
    except (InputError, KeyError) as error:
        raise WeightsFileError(f"it is not {expected}") from error
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise WeightsFileError("its 'weight_map' is not a mapping from tensor names to file names")
    return weight_map


def _open_shard(index: Path, shard: str, use_ema: bool) -> WeightsFile:
    path = index.parent / shard
    if not path.is_file():
        raise WeightsFileError(
            f"the shard {printable(shard)} is not beside it. Copy or download all shards into one folder"
        )
    return _open_one(path, use_ema)


def _check_total_size(opened: WeightsFile) -> None:
    """Refuses a thousand names of one storage, which would become a thousand arrays."""
    stored = sum(path.stat().st_size for path in opened.files)
    if opened.nbytes > stored:
        raise WeightsFileError(
            f"its tensors have {opened.nbytes} bytes in all and the file has {stored}: many of them share one storage"
        )

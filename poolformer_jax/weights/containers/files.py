"""Weights files of any container, read without PyTorch: what is in them, and nothing of it run.

safetensors (one file, or shards with an index) through the `safetensors` library; `torch.save` files through
`torch_files.py`. The container is told from the first bytes, never from the name. Every tensor stays in its file until
it is asked for, and nothing is allocated because a file claims a size: claims are compared with the file's own size.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from poolformer_jax.errors import MissingFileError
from poolformer_jax.fields import first_few
from poolformer_jax.weights.containers import torch_files
from poolformer_jax.weights.containers.storage import (
    DTYPES,
    MAX_STRUCTURE,
    Storage,
    StoredTensor,
    WeightsFileError,
    contiguous_strides,
    plain,
)

__all__ = ["StoredTensor", "WeightsFile", "WeightsFileError", "is_index", "open_weights", "read_index"]

# Where training scripts put the weights in a checkpoint: timm and sail's (state_dict, state_dict_ema), detectron's and
# DeiT's (model, model_ema), DeepSpeed's (module).
_WEIGHTS_KEYS = ("state_dict", "model", "model_state_dict", "module")
_EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_SAFETENSORS_DTYPES = {name: dtype for _, name, dtype in DTYPES}


@dataclass(frozen=True)
class WeightsFile:
    """A weights file that was opened: every tensor's name, type and shape, with the numbers still in the file.

    Args:
        path: the file, or the index of a sharded one.
        container: "safetensors", "sharded safetensors", "torch zip", "torch legacy", or "sharded torch".
        tensors: the state dict.
        wrapping: the key of the checkpoint that held it; None if the file is the state dict itself.
        has_ema: whether the checkpoint also holds an exponential moving average of the weights.
        others: what else the checkpoint holds (epoch, optimizer, ...), by key.
        metadata: the text that a safetensors file carries beside its tensors.
        files: every file that was read.
    """

    path: Path
    container: str
    tensors: Mapping[str, StoredTensor]
    wrapping: str | None = None
    has_ema: bool = False
    others: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the state dict's numbers."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_weights(path: str | Path, *, use_ema: bool = False) -> WeightsFile:
    """Opens a weights file, without reading the numbers in it.

    Args:
        path: a `.safetensors`, `.bin`, `.pth` or `.pth.tar` file, or the `.index.json` of a sharded one.
        use_ema: whether to take the moving average of the weights, where a checkpoint holds one.

    Raises:
        FileNotFoundError: if there is no such file.
        WeightsFileError: if it is damaged, asks for more than data, or is no weights file.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"There is no file {path}. Expected a weights file, or the index of a sharded one.")
    try:
        opened = _open_index(path, use_ema) if is_index(path) else _open_one(path, use_ema)
        _refuse_amplification(opened)
    except WeightsFileError as error:
        raise WeightsFileError(f"Cannot read the weights in {path}: {error}.") from error
    return opened


def _open_one(path: Path, use_ema: bool) -> WeightsFile:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(32)
        file.seek(0)
        _refuse_stand_ins(start)
        if start.startswith(torch_files.ZIP_MAGIC):
            return _checkpoint(path, "torch zip", torch_files.read_zip(path, file, size), use_ema)
        if start.startswith(b"\x80") and torch_files.LEGACY_MAGIC in start:
            return _checkpoint(path, "torch legacy", torch_files.read_legacy(path, file, size), use_ema)
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        if use_ema:
            raise WeightsFileError("it is a safetensors file, which holds one set of weights. Leave out use_ema")
        return _open_safetensors(path)
    raise WeightsFileError(f"it begins with {start[:8]!r}, expected a safetensors file or one that torch.save wrote")


def _refuse_stand_ins(start: bytes) -> None:
    """What often lies where a weights file should: nothing, a reference to it, or the page that links to it."""
    if not start:
        raise WeightsFileError("it is empty")
    if start.startswith(b"version https:"):
        raise WeightsFileError("it is Git LFS's note about the file and not the file. Run: git lfs pull")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise WeightsFileError("it is a web page. Download the file that the page links to")


def _open_safetensors(path: Path) -> WeightsFile:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_STRUCTURE:
        raise WeightsFileError(f"it claims a header of {length} bytes, more than {MAX_STRUCTURE}")
    # The library checks the header: that it fits the file, that every tensor's bytes are there, and that none overlap.
    try:
        with safe_open(path, framework="numpy") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsFileError(f"the safetensors library refuses it ({error}); it is truncated or damaged") from error
    with path.open("rb") as file:
        file.seek(8)
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if (dtype := _SAFETENSORS_DTYPES.get(entry["dtype"])) is None:
            raise WeightsFileError(f"its tensor {name[:80]!r} is of type {entry['dtype']}, which no PoolFormer has")
        shape = tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        storage = Storage(path, dtype.newbyteorder("<"), (end - begin) // dtype.itemsize, 8 + length + begin)
        tensors[name] = StoredTensor(storage, shape, contiguous_strides(shape))
    return WeightsFile(path, "safetensors", tensors, metadata=metadata, files=(path,))


def is_index(path: Path) -> bool:
    """Whether a name is that of an index; transformers' variants have theirs in it (`model...index.fp16.json`)."""
    return ".index." in path.name and path.suffix == ".json"


def read_index(path: Path) -> dict[str, set[str]]:
    """The shards that an index names, and the tensors that it places in each.

    Raises:
        WeightsFileError: if it is no index, or names a file that does not lie beside it.
    """
    shards: dict[str, set[str]] = {}
    for name, shard in _weight_map(path).items():
        # A shard lies beside its index. Anything else would let a file name what else it wants to read.
        if Path(shard).name != shard or "\\" in shard or shard in ("", ".", ".."):
            raise WeightsFileError(f"it places {name[:80]!r} in {shard[:80]!r}, expected the name of a file beside it")
        shards.setdefault(shard, set()).add(name)
    return shards


def _open_index(path: Path, use_ema: bool) -> WeightsFile:
    """A sharded file: the index says which shard holds which name, and both must agree."""
    tensors: dict[str, StoredTensor] = {}
    opened = [(_open_shard(path, shard, use_ema), names) for shard, names in sorted(read_index(path).items())]
    for one, names in opened:
        if lost := names - one.tensors.keys():
            raise WeightsFileError(f"it places {_some(lost)} in {one.path.name}, which does not hold that")
        if extra := one.tensors.keys() - names:
            raise WeightsFileError(f"{one.path.name} holds {_some(extra)}, which the index does not place there")
        tensors |= one.tensors
    kinds = {one.container for one, _ in opened}
    container = "sharded safetensors" if kinds == {"safetensors"} else "sharded torch"
    return WeightsFile(path, container, tensors, files=(path, *(one.path for one, _ in opened)))


def _weight_map(path: Path) -> dict[str, str]:
    if path.stat().st_size > MAX_STRUCTURE:
        raise WeightsFileError(f"it has more than {MAX_STRUCTURE} bytes, no index of a PoolFormer needs that many")
    try:
        index = json.loads(path.read_bytes())
        weight_map = index["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WeightsFileError("it is no index of a sharded file: expected JSON with a 'weight_map'") from error
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise WeightsFileError("its 'weight_map' is no mapping from tensor names to file names")
    return weight_map


def _open_shard(index: Path, shard: str, use_ema: bool) -> WeightsFile:
    path = index.parent / shard
    if not path.is_file():
        raise WeightsFileError(f"the shard {shard} is not beside it. Copy or download all shards into one folder")
    return _open_one(path, use_ema)


def _checkpoint(path: Path, container: str, loaded: Any, use_ema: bool) -> WeightsFile:
    """Finds the state dict in what a `torch.save` file holds."""
    if not isinstance(loaded, dict):
        raise WeightsFileError(f"it holds {_kind(loaded)}, expected a state dict or a checkpoint with one")
    ema = [key for key in _EMA_KEYS if _holds_tensors(loaded.get(key))]
    wrapped = ema if use_ema else [key for key in _WEIGHTS_KEYS if isinstance(loaded.get(key), dict)]
    others = tuple(plain(str(key)) for key in loaded if key not in wrapped[:1])
    if use_ema and not ema:
        raise WeightsFileError(f"it holds no moving average of the weights, only {_some(others)}. Leave out use_ema")
    if not wrapped and ema and not _holds_tensors(loaded):
        raise WeightsFileError(f"it holds nothing but a moving average of the weights ({ema[0]}). Ask for it: use_ema")
    if wrapped:
        tensors = _state_dict(loaded[wrapped[0]])
        return WeightsFile(path, container, tensors, wrapped[0], bool(ema), others, files=(path,))
    return WeightsFile(path, container, _state_dict(loaded), files=(path,))


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(entry, StoredTensor) for entry in value.values())


def _state_dict(loaded: Mapping[Any, Any]) -> dict[str, StoredTensor]:
    if wrong := [
        key for key, value in loaded.items() if not (isinstance(key, str) and isinstance(value, StoredTensor))
    ]:
        shown = _some(f"{plain(str(key))} ({_kind(loaded[key])})" for key in wrong)
        raise WeightsFileError(f"its state dict holds something else than tensors by name: {shown}")
    if not loaded:
        raise WeightsFileError("its state dict is empty")
    return dict(loaded)


def _refuse_amplification(opened: WeightsFile) -> None:
    """A thousand names for one storage would become a thousand arrays."""
    stored = sum(path.stat().st_size for path in opened.files)
    if opened.nbytes > stored:
        raise WeightsFileError(
            f"its tensors have {opened.nbytes} bytes together and the file has {stored}: many of them share one storage"
        )


def _kind(value: Any) -> str:
    return "an object" if type(value).__module__.startswith(__package__) else f"a {type(value).__name__}"


def _some(names: Iterable[str]) -> str:
    return first_few([plain(name) for name in sorted(names)], 3) or "nothing"

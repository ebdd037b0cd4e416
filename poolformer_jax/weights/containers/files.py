"""Opens weights files of any container without PyTorch, and without running anything that they contain.

safetensors (one file, or shards with an index) through the `safetensors` library; `torch.save` files through
`torch_files.py`. The first bytes decide the container, not the file's name. Tensors stay in the file until they are
read, and every size that a file claims is compared with the file's real size before memory is allocated.
"""

import itertools
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from poolformer_jax.errors import InputError, MissingFileError
from poolformer_jax.files import read_json
from poolformer_jax.messages import first_few, printable, short_repr
from poolformer_jax.weights.containers import torch_files
from poolformer_jax.weights.containers.pickle_names import Inert
from poolformer_jax.weights.containers.storage import (
    DTYPES,
    MAX_STRUCTURE,
    Storage,
    StoredTensor,
    WeightsFileError,
    contiguous_strides,
)

__all__ = ["StoredTensor", "WeightsFile", "WeightsFileError", "is_index", "open_weights", "read_index"]

# Where training scripts put the weights in a checkpoint: timm and sail's (state_dict, state_dict_ema), detectron's and
# DeiT's (model, model_ema), DeepSpeed's (module).
_WEIGHTS_KEYS = ("state_dict", "model", "model_state_dict", "module")
# Entries whose arrays are no weights: optimizer states have dicts of tensors, too.
_NO_WEIGHTS = re.compile(r"optim|sched|scaler|rng|loop|callback|param_shapes|buffer", re.IGNORECASE)
_EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_MOST_OTHERS = 100  # entries before the first tensor of a state dict
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


def names_to_read(names: Iterable[str], ignore: Sequence[str]) -> list[str]:
    """The names that none of the patterns in `ignore` matches."""
    if isinstance(ignore, str):
        raise InputError(f"ignore={ignore!r} is one text. Expected a list of patterns: ignore=[{ignore!r}].")
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in ignore)]


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
            return _checkpoint(path, "torch zip", torch_files.read_zip(path, file, size), use_ema, ignore)
        if start.startswith(b"\x80") and torch_files.LEGACY_MAGIC in start:
            return _checkpoint(path, "torch legacy", torch_files.read_legacy(path, file, size), use_ema, ignore)
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        if use_ema:
            raise WeightsFileError("it is a safetensors file, which has no second set of weights. Leave out use_ema")
        return _open_safetensors(path)
    raise WeightsFileError(f"it begins with {start[:8]!r}, expected a safetensors file or one that torch.save wrote")


def _check_not_a_placeholder(start: bytes) -> None:
    """Names what failed downloads leave behind: an empty file, a Git LFS pointer, a web page."""
    if not start:
        raise WeightsFileError("it is empty")
    if start.startswith(b"version https:"):
        raise WeightsFileError("it is a Git LFS pointer, not the file. Run: git lfs pull")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise WeightsFileError("it is a web page. Download the file that the page links to")


def _open_safetensors(path: Path) -> WeightsFile:
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
        if lost := names - one.tensors.keys():
            raise WeightsFileError(f"it places {_some(lost)} in {one.path.name}, which does not have it")
        if extra := one.tensors.keys() - names:
            raise WeightsFileError(f"{one.path.name} has {_some(extra)}, which the index does not place there")
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
        raise WeightsFileError(f"the shard {shard} is not beside it. Copy or download all shards into one folder")
    return _open_one(path, use_ema)


def _checkpoint(path: Path, container: str, loaded: Any, use_ema: bool, ignore: Sequence[str]) -> WeightsFile:
    """Finds the state dict in the object of a `torch.save` file."""
    if isinstance(loaded, Inert) and loaded.name:
        raise WeightsFileError(_needs(loaded))
    if not isinstance(loaded, dict):
        raise WeightsFileError(f"it contains {_kind(loaded)}, expected a state dict or a checkpoint with one")
    _check_not_a_shard(loaded)
    ema = [key for key in _EMA_KEYS if _holds_tensors(loaded.get(key))]
    found = {".".join(keys): (keys, value) for keys, value in _state_dicts(loaded)}
    wrapped = next(iter(ema), None) if use_ema else _choose(found, loaded)
    others = tuple(printable(str(key)) for key in loaded if key != (wrapped or "").split(".")[0])
    if use_ema and not ema:
        raise WeightsFileError(f"it has no moving average of the weights, only {_some(others)}. Leave out use_ema")
    if wrapped is None and ema and not _holds_tensors(loaded):
        raise WeightsFileError(f"it has only a moving average of the weights ({ema[0]}). Pass use_ema=True (--ema)")
    architecture = loaded.get("arch") if isinstance(loaded.get("arch"), str) else None
    if wrapped is None:
        return WeightsFile(path, container, _state_dict(loaded, ignore), architecture=architecture, files=(path,))
    tensors = _state_dict(loaded[wrapped] if use_ema else found[wrapped][1], ignore)
    return WeightsFile(path, container, tensors, wrapped, architecture, bool(ema), others, files=(path,))


def _state_dicts(loaded: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every dict of tensors in a checkpoint, or in one of its entries, that may be the weights; with its keys."""
    seen: set[int] = set()  # a hostile pickle can place one dict under a hundred thousand keys
    for key, value in loaded.items():
        if not (isinstance(key, str) and isinstance(value, dict)) or key in _EMA_KEYS or _NO_WEIGHTS.search(key):
            continue
        if _holds_tensors(value):
            yield (key,), value
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        for inner, entry in value.items():
            if isinstance(inner, str) and _holds_tensors(entry) and not _NO_WEIGHTS.search(inner):
                yield (key, inner), entry


def _choose(found: Mapping[str, Any], loaded: Mapping[Any, Any]) -> str | None:
    """The weights among the dicts of tensors: by the names of convention, or the only one. None: the file itself."""
    conventional = [key for key in _WEIGHTS_KEYS if key in found]
    conventional += [key for key in found if key not in conventional and found[key][0][-1] in _WEIGHTS_KEYS]
    if conventional or len(found) == 1:
        chosen = conventional[0] if conventional else next(iter(found))
        if not conventional and _holds_tensors(loaded):
            return None
        if rest := [key for key in conventional[1:] if found[key][1].keys() != found[chosen][1].keys()]:
            warnings.warn(
                f"The checkpoint has several sets of arrays: {_some([chosen, *rest])}. Reads {short_repr(chosen)}; to "
                "read another, save it alone.",
                stacklevel=2,
            )
        return chosen
    if found and not _holds_tensors(loaded):
        raise WeightsFileError(
            f"it has several sets of arrays, none under a usual key ({', '.join(_WEIGHTS_KEYS)}): {_some(found)}. Save "
            "the one that is meant alone"
        )
    return None


def _check_not_a_shard(loaded: Mapping[Any, Any]) -> None:
    """Names the parts that DeepSpeed and FSDP write, each of which has a part of every array."""
    weights = loaded.get("module")
    empty = isinstance(weights, dict) and any(isinstance(v, StoredTensor) and 0 in v.shape for v in weights.values())
    state = loaded.get("optimizer_state_dict")
    if ("ds_version" in loaded and empty) or (isinstance(state, dict) and "zero_stage" in state):
        raise WeightsFileError(
            "it is one shard of a DeepSpeed checkpoint, without whole arrays. Join the shards with the zero_to_fp32.py "
            "that DeepSpeed puts beside them"
        )
    dicts = {id(one): one for one in (loaded, *loaded.values()) if isinstance(one, dict)}
    if any(_is_part(name, value) for one in dicts.values() for name, value in one.items()):
        raise WeightsFileError(
            "it is one shard of a distributed checkpoint (FSDP, DTensor), with a part of every array. Save the full "
            "state dict (torch.distributed.checkpoint.state_dict, full_state_dict=True)"
        )


def _is_part(name: Any, value: Any) -> bool:
    """True for an entry with which FSDP or DTensor save a part of an array."""
    parts = isinstance(value, Inert) and value.name.endswith((".DTensor", ".ShardedTensor"))
    return parts or (isinstance(name, str) and name.endswith("_flat_param"))


def _holds_tensors(value: Any) -> bool:
    # Optimizers put numbers before tensors. Looking at all of a hostile file's entries could take hours.
    return isinstance(value, dict) and any(
        isinstance(entry, StoredTensor) for entry in itertools.islice(value.values(), _MOST_OTHERS)
    )


def _state_dict(loaded: Mapping[Any, Any], ignore: Sequence[str]) -> dict[str, StoredTensor]:
    names = {key for key in loaded if isinstance(key, str)}
    ignored = names.difference(names_to_read(names, ignore))
    wrong = [key for key, value in loaded.items() if key not in ignored and not _is_tensor(key, value)]
    if unknown := [loaded[key] for key in wrong if isinstance(loaded[key], Inert) and loaded[key].name]:
        raise WeightsFileError(_needs(unknown[0]))
    if wrong:
        shown = _some(f"{printable(str(key))} ({_kind(loaded[key])})" for key in wrong)
        raise WeightsFileError(
            f"its state dict has entries that are not tensors by name: {shown}. To leave them out, pass "
            "ignore=[...] (--ignore NAME)"
        )
    if not loaded:
        raise WeightsFileError("its state dict is empty")
    return {key: value for key, value in loaded.items() if key not in ignored}


def _is_tensor(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, StoredTensor)


def _needs(unknown: Inert) -> str:
    return (
        f"its pickle needs {printable(unknown.name)}, which is neither a tensor nor a container. Nothing was run. If "
        "you trust the file, load it with PyTorch and save model.state_dict() alone"
    )


def _check_total_size(opened: WeightsFile) -> None:
    """Refuses a thousand names of one storage, which would become a thousand arrays."""
    stored = sum(path.stat().st_size for path in opened.files)
    if opened.nbytes > stored:
        raise WeightsFileError(
            f"its tensors have {opened.nbytes} bytes in all and the file has {stored}: many of them share one storage"
        )


def _kind(value: Any) -> str:
    return "an object" if type(value).__module__.startswith(__package__) else f"a {type(value).__name__}"


def _some(names: Iterable[str]) -> str:
    return first_few(sorted(names), 3) or "nothing"

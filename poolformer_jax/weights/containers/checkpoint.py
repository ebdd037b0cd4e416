"""Finds the state dict in what a `torch.save` file contains, which may be a whole training checkpoint."""

import itertools
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from poolformer_jax.messages import first_few, printable, short_repr
from poolformer_jax.weights.containers.ignore import names_to_read
from poolformer_jax.weights.containers.pickle_names import Inert
from poolformer_jax.weights.containers.storage import StoredTensor, WeightsFileError

# Where training scripts put the weights in a checkpoint: timm and sail's (state_dict, state_dict_ema), detectron's and
# DeiT's (model, model_ema), DeepSpeed's (module).
_WEIGHTS_KEYS = ("state_dict", "model", "model_state_dict", "module")
# Entries whose arrays are no weights: optimizer states have dicts of tensors, too.
_NO_WEIGHTS = re.compile(r"optim|sched|scaler|rng|loop|callback|param_shapes|buffer", re.IGNORECASE)
_EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_MOST_OTHERS = 100  # entries before the first tensor of a state dict


class Checkpoint(NamedTuple):
    """The state dict of a file, and what else the file has. The fields are those of `files.WeightsFile`."""

    tensors: Mapping[str, StoredTensor]
    wrapping: str | None = None
    architecture: str | None = None
    has_ema: bool = False
    others: tuple[str, ...] = ()


def find_state_dict(loaded: Any, use_ema: bool, ignore: Sequence[str]) -> Checkpoint:
    """The weights in the object of a `torch.save` file.

    Raises WeightsFileError if it has none, or several that could be meant.
    """
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
        return Checkpoint(_state_dict(loaded, ignore), architecture=architecture)
    tensors = _state_dict(loaded[wrapped] if use_ema else found[wrapped][1], ignore)
    return Checkpoint(tensors, wrapped, architecture, bool(ema), others)


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


def _kind(value: Any) -> str:
    return "an object" if type(value).__module__.startswith(__package__) else f"a {type(value).__name__}"


def _some(names: Iterable[str]) -> str:
    return first_few(sorted(names), 3) or "nothing"

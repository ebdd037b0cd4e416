"""Works out the layout and the network of a state dict from its names and shapes alone.

Every name is matched with the tables of `names.py`. Each dimension of each array then votes for the size that the
tables say it has (c channels, m hidden channels, ...), and the majority wins, so that one damaged array does not hide
what the others say.
"""

import dataclasses
import math
import re
import warnings
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from poolformer_jax.errors import InputError
from poolformer_jax.messages import first_few, printable
from poolformer_jax.network import MIXER_PARAMETERS, PoolFormerConfig, published_variant
from poolformer_jax.weights.names import LAYOUTS, MLP, TRANSFORMS, Row, parameter_rows

# transformers' PoolFormerModel saves the backbone without the prefix "poolformer.".
_HF_BACKBONE = "encoder."
# Names of the stem. What precedes them is the prefix of a wrapper (module., _orig_mod., backbone., ...).
_STEM = tuple(
    row.name.removeprefix("poolformer.") for table in LAYOUTS.values() for row in table.rows if "stem" in row.path
)
_SWA_COUNTER = "n_averaged"  # torch.optim.swa_utils.AveragedModel saves it beside the weights
# Parts of names that wrappers of a network, or of a part of it, insert: DistributedDataParallel, torch.compile, FSDP,
# activation checkpointing.
_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")
# Buffers of losses, such as class weights, which Lightning saves beside the network's.
_LOSS = re.compile(r"(?:^|\.)(?:\w+_)?(?:loss|criterion)(?:_\w+)?\.")
_BATCH_NORM = re.compile(r"(?:^|\.)norm\d?\.running_(?:mean|var)")

Shape = tuple[int, ...]


class _Match(NamedTuple):
    """A name of the state dict matched with a row of a table. `indices` are those written in the name."""

    given: str
    row: Row
    indices: Mapping[str, int]
    shape: Shape


@dataclass(frozen=True)
class MatchedNames:
    """The names of a state dict, matched with the layout that explains most of them."""

    layout: str  # a key of `names.LAYOUTS`
    names: Mapping[str, str]  # the state dict's own name for each name of the layout; they differ by a prefix at most
    shapes: Mapping[str, Shape]  # shape of every array by its name in the state dict
    matches: tuple[_Match, ...]  # every name that has a row in the layout's table

    @property
    def has_classifier(self) -> bool:
        """False if the state dict is of a backbone, without final norm and head."""
        return any(match.row.path.startswith(("norm/", "head/")) for match in self.matches)


def match_names(shapes: Mapping[str, Shape]) -> MatchedNames:
    """Finds the layout of a state dict, and the row of its table that each name belongs to.

    Raises InputError if no known layout has these names.
    """
    losses = [name for name in shapes if _LOSS.search(name)]
    names = _unwrap(name for name in shapes if name not in set(losses))
    if losses:
        warnings.warn(f"Leaves out arrays of a loss: {first_few(losses, 3)}.", stacklevel=2)
    if batch_norm := next((name for name in names if _BATCH_NORM.search(name)), None):
        raise InputError(
            f"These weights have BatchNorm ({printable(batch_norm)}), such as the authors' ablation poolformer_bn_s12. "
            "It computes another function than the norms that this version has: GroupNorm, and LayerNorm over channels."
        )
    matches = {layout: _match(layout, names, shapes) for layout in LAYOUTS}
    layout = max(matches, key=lambda name: len(matches[name]))
    if not any(match.row.path.startswith("stages") for match in matches[layout]):
        shown = ", ".join(printable(name) for name in list(shapes)[:4]) or "nothing"
        raise InputError(
            f"These {len(shapes)} names are not those of a PoolFormer: {shown}, ... Expected names as in sail "
            "('network.0.0.norm1.weight', 'stages.0.0.norm1.weight'), transformers "
            "('poolformer.encoder.block.0.0.before_norm.weight'), timm ('stages.0.blocks.0.norm1.weight') or this "
            "package ('stages_0/blocks_0/norm1/scale')."
        )
    return MatchedNames(layout, names, shapes, tuple(matches[layout]))


def infer_config(matched: MatchedNames) -> PoolFormerConfig:
    """The network that explains names and shapes; what no array shows (strides, activation, rates) is as published.

    Raises InputError if names and shapes do not determine a network.
    """
    with_stages = _stages(matched.matches)
    count = 1 + max(stage for stage, _ in with_stages if stage is not None)
    depths: Counter[int] = Counter()
    votes: dict[tuple[int, str], Counter[int]] = defaultdict(Counter)
    conditions: dict[int, set[str]] = defaultdict(set)
    parameters = parameter_rows()
    for stage, match in with_stages:
        at = count - 1 if stage is None else stage
        conditions[at].add(parameters[match.row.path].when)
        # The highest index, not the number of blocks: a block that was lost is then reported as missing.
        depths[at] = max(depths[at], match.indices.get("b", -1) + 1)
        for symbol, size in _dimensions(match, parameters[match.row.path].shape):
            votes[at, symbol][size] += 1
    if max(count, sum(depths.values())) > len(matched.names):
        raise InputError(
            f"These {len(matched.names)} names are numbered up to {count} stages and {sum(depths.values())} blocks. "
            "Expected no more stages and blocks than arrays; the names are damaged."
        )
    return _config(matched.layout, [depths[stage] for stage in range(count)], votes, conditions)


def _unwrap(names: Iterable[str]) -> dict[str, str]:
    """The given names by the names that a layout's table has, without wrappers and their prefixes."""
    given = [name for name in names if name.rpartition(".")[2] != _SWA_COUNTER]
    inner = {_WRAPPER.sub("", name): name for name in given}
    prefixes = (
        name.removesuffix(stem).removesuffix("poolformer.") for name in inner for stem in _STEM if name.endswith(stem)
    )
    prefix = next((prefix for prefix in prefixes if prefix.endswith(".")), "")
    bare = {_without_prefix(name, prefix): inner[name] for name in inner}
    if len(bare) < len(given):  # two networks; which one is meant is unknown
        bare = {name: name for name in given}
    for rename in (_of_transformers_backbone, _of_mmpretrain, _of_features_only):
        renamed = rename(bare)
        bare = {renamed.get(name, name): given for name, given in bare.items()}
    return bare


def _without_prefix(name: str, prefix: str) -> str:
    """The name without `prefix`, or without as many of its parts as the name has: the head is outside "backbone."."""
    while prefix and not name.startswith(prefix):
        prefix = prefix[: prefix.rstrip(".").rfind(".") + 1]
    return name.removeprefix(prefix)


def _of_transformers_backbone(names: Collection[str]) -> dict[str, str]:
    return {name: f"poolformer.{name}" for name in names if name.startswith(_HF_BACKBONE)}


def _of_mmpretrain(names: Collection[str]) -> dict[str, str]:
    """mmpretrain has the authors' names, but numbers the norm of each feature map, and its classifier is `head.fc`."""
    if not any(name.startswith("network.") for name in names):
        return {}
    renamed = {name: f"head.{name.removeprefix('head.fc.')}" for name in names if name.startswith("head.fc.")}
    norms = [match for name in names if (match := re.fullmatch(r"(norm\d+)\.(?:weight|bias)", name))]
    if len({match[1] for match in norms}) == 1:  # several are those of a detector's feature maps
        renamed |= {match[0]: match[0].replace(match[1], "norm") for match in norms}
    return {name: new for name, new in renamed.items() if new not in names}


def _of_features_only(names: Collection[str]) -> dict[str, str]:
    """timm's models with `features_only=True` flatten "stages.0" to "stages_0"."""
    renamed = {name: re.sub(r"^stages_(\d+)\.", r"stages.\1.", name) for name in names}
    return {name: new for name, new in renamed.items() if new not in names}


@cache
def _pattern(rows: tuple[Row, ...]) -> re.Pattern[str]:
    """One expression for all names of a layout. Group `row_<N>` is the row, and the groups in it are the indices."""
    branches = []
    for number, row in enumerate(rows):
        # Nine digits are more than any network has, and keep a hostile index small.
        indexed = re.sub(r"\\\{(\w+)\\\}", rf"(?P<\1_{number}>0|[1-9][0-9]{{0,8}})", re.escape(row.name))
        branches.append(f"(?P<row_{number}>{indexed})")
    return re.compile("|".join(branches))


def _match(layout: str, names: Mapping[str, str], shapes: Mapping[str, Shape]) -> list[_Match]:
    """Every name that has a row in the layout's table."""
    rows, found = LAYOUTS[layout].rows, []
    pattern = _pattern(rows)
    for name, given in names.items():
        if (match := pattern.fullmatch(name)) is None:
            continue
        row = rows[int(str(match.lastgroup).removeprefix("row_"))]
        texts = {key.split("_")[0]: text for key, text in match.groupdict().items() if text is not None}
        indices = {key: int(text) for key, text in texts.items() if key != "row"}
        found.append(_Match(given, row, indices, shapes[given]))
    return found


def _stages(matches: Sequence[_Match]) -> list[tuple[int | None, _Match]]:
    """Every match with the number of its stage; None if it has no stage."""
    # sail numbers the entries of one list. The n-th entry with blocks is stage n, and a downsampling or position
    # embedding belongs to the stage whose blocks follow it.
    blocks = sorted({m.indices["at"] for m in matches if "at" in m.indices})
    with_stages: list[tuple[int | None, _Match]] = []
    for match in matches:
        place = next((match.indices[key] for key in ("at", "down", "pos") if key in match.indices), None)
        if place is not None:
            with_stages.append((bisect_left(blocks, place), match))
        else:
            with_stages.append((match.indices.get("s", 0 if match.row.path.startswith("stem") else None), match))
    return with_stages


def _dimensions(match: _Match, symbols: tuple[str, ...]) -> list[tuple[str, int]]:
    """Symbol and size of each dimension of the array; empty if the number of dimensions is wrong."""
    placeholder = np.broadcast_to(np.int8(0), (1,) * len(symbols))
    key = match.row.transform
    transform = TRANSFORMS[("linear" if len(match.shape) == len(symbols) else "pointwise") if key == MLP else key]
    if len(match.shape) != transform.to_layout(placeholder).ndim or 0 in match.shape:
        return []
    shape = transform.to_tree(np.broadcast_to(np.int8(0), match.shape)).shape
    return list(zip(symbols, shape))


def _config(
    layout: str, depths: list[int], votes: Mapping[tuple[int, str], Counter[int]], conditions: Mapping[int, set[str]]
) -> PoolFormerConfig:
    """The network with the sizes that won the votes."""

    def winner(stage: int, symbol: str) -> int | None:
        counter = votes.get((stage, symbol))
        return counter.most_common(1)[0][0] if counter else None

    stages = range(len(depths))
    widths = [winner(stage, "c") for stage in stages]
    if unknown := [stage for stage in stages if not widths[stage] or not depths[stage]]:
        raise InputError(
            f"This state dict, in the layout {layout!r}, has {len(depths)} stages, and no array of stage "
            f"{', '.join(map(str, unknown))}. Expected arrays of every stage; give the file as it was saved."
        )
    mixers = _mixers([conditions[stage] for stage in stages])
    patches = [winner(stage, "k") for stage in stages]
    architecture: dict[str, Any] = {
        "num_channels": winner(0, "i") or 3,
        "depths": tuple(depths),
        "hidden_sizes": tuple(widths),
        "mlp_ratio": _mlp_ratio([(c, m) for c, m in zip(widths, (winner(s, "m") for s in stages)) if c and m]),
        "token_mixers": mixers,
        "position_embeddings": tuple("position embedding" in conditions[stage] for stage in stages),
        **_convolutions(patches),
        **_block_and_head(mixers, [conditions[stage] for stage in stages]),
    }
    architecture |= {
        "num_labels": winner(len(depths) - 1, "l") or 0,
        "image_size": _image_size(architecture["strides"], winner, stages),
    }
    config = _as_published(PoolFormerConfig(**architecture))
    return dataclasses.replace(config, **LAYOUTS[layout].fixed_fields(config))


def _block_and_head(mixers: tuple[str, ...], conditions: Sequence[set[str]]) -> dict[str, Any]:
    """The fields that say which optional parameters blocks, convolutions and head have."""
    present = set().union(*conditions)
    second_paper = not {"stem norm", "downsample norm"}.isdisjoint(present)
    norm_bias = "norm bias" in present
    # Both norms have parameters of the same shapes. The first paper's networks with attention normalise over channels,
    # and of the second paper ConvFormer and CAFormer; all others over the whole map.
    over_channels = {"attention", "sep_conv"} if second_paper else {"attention"}
    scales = tuple(1.0 if "residual scale" in present_here else None for present_here in conditions)
    mlp_head = second_paper and "linear head" not in present and not over_channels.isdisjoint(mixers)
    return {
        "norm": "group_norm" if over_channels.isdisjoint(mixers) else "layer_norm",
        "norm_bias": norm_bias,
        "norm_epsilon": 1e-5 if norm_bias else 1e-6,
        "downsample_norm": second_paper,
        "mlp_bias": "mlp bias" in present,
        "hidden_act": "star_relu" if "star relu" in present else "gelu",
        "attention_bias": "attention bias" in present if "attention" in mixers else not second_paper,
        "use_layer_scale": "layer scale" in present,
        "residual_scale_init_values": scales if any(scales) else None,
        "head": "mlp" if mlp_head or "mlp head" in present else "linear",
        "head_order": "pool_norm" if second_paper else "norm_pool",
        "convolution_init": "normal" if second_paper else "torch",
    }


def _mlp_ratio(sizes: list[tuple[int, int]]) -> float:
    """The ratio for which int(channels * ratio) is the hidden size of most stages."""
    # (m / c) * c may be a rounding error below m; the next number up is not.
    candidates = [r for c, m in sizes for r in (m / c, math.nextafter(m / c, math.inf))]
    return max(candidates, key=lambda ratio: sum(int(c * ratio) == m for c, m in sizes), default=4.0)


def _mixers(conditions: Sequence[set[str]]) -> tuple[str, ...]:
    # Pooling and identity have no parameters and look alike. Beside random mixing, published networks have identity;
    # otherwise pooling is assumed, which `transfer.warn_of_assumptions` reports.
    known = [next((name for name in MIXER_PARAMETERS if name in present), None) for present in conditions]
    return tuple(name or ("identity" if "random" in known else "pooling") for name in known)


def _convolutions(patches: list[int | None]) -> dict[str, tuple[int, ...]]:
    """Kernel, stride and padding per stage. Only kernels show in the arrays; stride and padding are as published."""
    published = [(7, 4, 2)] + [(3, 2, 1)] * (len(patches) - 1)
    for stage, (patch, (kernel, *_)) in enumerate(zip(patches, published)):
        if patch not in (None, kernel):
            raise InputError(
                f"The convolution into stage {stage} has a kernel of {patch}, which does not determine its stride and "
                f"padding. Expected the published {kernel}; for another network pass its PoolFormerConfig."
            )
    kernels, strides, padding = zip(*published)
    return {"patch_sizes": kernels, "strides": strides, "padding": padding}


def _image_size(strides: tuple[int, ...], winner: Any, stages: range) -> int | None:
    """The input side that position embeddings or spatial fc require; None if the network has neither."""
    for stage in stages:
        side = winner(stage, "h") or math.isqrt(winner(stage, "n") or 0)
        if side:
            return int(side) * math.prod(strides[: stage + 1])
    return None


def _as_published(config: PoolFormerConfig) -> PoolFormerConfig:
    """The same network; for a published architecture, with the other fields as published (initial layer scale)."""
    if (variant := published_variant(config)) is None:
        return config
    kept = ("num_labels", "use_layer_scale", "image_size", "head_order")
    return PoolFormerConfig.from_variant(variant, **{field: getattr(config, field) for field in kept})

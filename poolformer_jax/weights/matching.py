"""Finds the layout of a state dict, and the row of its table that each name belongs to; the tables are in `names`."""

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from poolformer_jax.errors import InputError
from poolformer_jax.messages import first_few, printable
from poolformer_jax.weights.names import LAYOUTS, Row

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


class Match(NamedTuple):
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
    matches: tuple[Match, ...]  # every name that has a row in the layout's table

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


def _match(layout: str, names: Mapping[str, str], shapes: Mapping[str, Shape]) -> list[Match]:
    """Every name that has a row in the layout's table."""
    rows, found = LAYOUTS[layout].rows, []
    pattern = _pattern(rows)
    for name, given in names.items():
        if (match := pattern.fullmatch(name)) is None:
            continue
        row = rows[int(str(match.lastgroup).removeprefix("row_"))]
        texts = {key.split("_")[0]: text for key, text in match.groupdict().items() if text is not None}
        indices = {key: int(text) for key, text in texts.items() if key != "row"}
        found.append(Match(given, row, indices, shapes[given]))
    return found

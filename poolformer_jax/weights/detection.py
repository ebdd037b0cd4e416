"""Which layout, and which network, a state dict is of: worked out from its names and shapes alone.

Nothing here lists a name. Every name of the state dict is read with the tables of `names.py`, and every dimension of
every array then votes for the symbol that the tables give it (c channels, m hidden channels, ...); the majority wins,
so one damaged array does not hide what the others say.
"""

import math
import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from poolformer_jax.errors import InputError
from poolformer_jax.network import MIXER_PARAMETERS, PoolFormerConfig, published_variant
from poolformer_jax.weights.containers.storage import plain
from poolformer_jax.weights.names import LAYOUTS, TRANSFORMS, Row, parameter_rows

# transformers' PoolFormerModel saves the backbone without the classifier's attribute name.
_HF_BACKBONE = "encoder."
# Networks of "MetaFormer Baselines for Vision" normalise before or after the stem, in timm's names and the authors'.
_SECOND_PAPER = ("stem.norm.weight", "downsample_layers.0.conv.weight")
# The stem's names: what stands before them is the prefix of a wrapper (module., _orig_mod., backbone., ...).
_STEM = (
    *(row.name.removeprefix("poolformer.") for table in LAYOUTS.values() for row in table.rows if "stem" in row.path),
    *_SECOND_PAPER,
)
_COUNT = "n_averaged"  # of the averages taken, beside the weights in torch.optim.swa_utils.AveragedModel

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Detection:
    """What a state dict holds.

    Args:
        layout: a key of `names.LAYOUTS`.
        config: the network; what no array tells (strides, activation, rates) is as published.
        names: the state dict's own names by their names in the layout, which differ by a prefix at most.
        classifier: whether there is a final norm; without it the state dict is of a backbone.
    """

    layout: str
    config: PoolFormerConfig
    names: Mapping[str, str]
    classifier: bool

    @property
    def variant(self) -> str | None:
        """The published name of the network, or None if it is none of those."""
        return published_variant(self.config)


class _Match(NamedTuple):
    """A name of the state dict read as a row of a table. Indices are those written in the name."""

    given: str
    row: Row
    indices: Mapping[str, int]
    shape: Shape


@dataclass(frozen=True)
class ReadNames:
    """The names of a state dict, read in the layout that explains most of them.

    Args:
        layout: a key of `names.LAYOUTS`.
        names: as in `Detection`.
        matches: every name that the layout explains.
    """

    layout: str
    names: Mapping[str, str]
    matches: tuple[_Match, ...]

    @property
    def explained(self) -> list[str]:
        """The state dict's own names of what a network of this layout may have."""
        return [match.given for match in self.matches]


def read_names(shapes: Mapping[str, Shape]) -> ReadNames:
    """The layout of a state dict, and which of its rows each name is.

    Args:
        shapes: shape of every array by its name, in any order.

    Raises:
        ValueError: if the names are of no known layout.
    """
    names = _unwrap(shapes)
    if any(name in names for name in _SECOND_PAPER):
        raise InputError(
            "These weights are of the second paper's networks (PoolFormerV2, IdentityFormer, RandFormer, ConvFormer, "
            "CAFormer), which this version does not have. Expected a PoolFormer or MetaFormer of the first paper."
        )
    matches = {layout: _read(layout, names, shapes) for layout in LAYOUTS}
    layout = max(matches, key=lambda name: len(matches[name]))
    if not any(match.row.path.startswith("stages") for match in matches[layout]):
        raise InputError(_unknown(shapes))
    return ReadNames(layout, names, tuple(matches[layout]))


def network_of_names(read: ReadNames, config: PoolFormerConfig | None = None) -> Detection:
    """The network, from the shapes; `config` if the caller knows it.

    Raises:
        ValueError: if names and shapes do not tell it.
    """
    classifier = any(match.row.path.startswith(("norm/", "head/")) for match in read.matches)
    return Detection(read.layout, config or _infer(read.layout, read.matches, len(read.names)), read.names, classifier)


def _unwrap(names: Iterable[str]) -> dict[str, str]:
    """Names without the prefix that a wrapper put before them, and what they were."""
    given = [name for name in names if name != _COUNT]
    prefixes = (
        name.removesuffix(stem).removesuffix("poolformer.") for name in given for stem in _STEM if name.endswith(stem)
    )
    prefix = next((prefix for prefix in prefixes if prefix.endswith(".")), "")
    bare = {name.removeprefix(prefix): name for name in given}
    if len(bare) < len(given):  # two networks, and no telling which is meant
        bare = {name: name for name in given}
    if any(name.startswith(_HF_BACKBONE) for name in bare):
        bare = {f"poolformer.{name}" if name.startswith(_HF_BACKBONE) else name: bare[name] for name in bare}
    return bare


@cache
def _pattern(rows: tuple[Row, ...]) -> re.Pattern[str]:
    """One expression for all names of a layout; group `row<N>` tells the row, and the groups in it the indices."""
    branches = []
    for number, row in enumerate(rows):
        # Nine digits are more than any network has, and keep a hostile index small.
        indexed = re.sub(r"\\\{(\w+)\\\}", rf"(?P<\1_{number}>0|[1-9][0-9]{{0,8}})", re.escape(row.name))
        branches.append(f"(?P<row_{number}>{indexed})")
    return re.compile("|".join(branches))


def _read(layout: str, names: Mapping[str, str], shapes: Mapping[str, Shape]) -> list[_Match]:
    """Every name that some row of the layout explains."""
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
    """Every match with the number of its stage; None for those of no stage."""
    # sail counts places in one list. The n-th place that holds blocks is stage n, and a downsampling or position
    # embedding belongs to the stage whose blocks follow it.
    blocks = sorted({m.indices["at"] for m in matches if "at" in m.indices})
    placed: list[tuple[int | None, _Match]] = []
    for match in matches:
        place = next((match.indices[key] for key in ("at", "down", "pos") if key in match.indices), None)
        if place is not None:
            placed.append((bisect_left(blocks, place), match))
        else:
            placed.append((match.indices.get("s", 0 if match.row.path.startswith("stem") else None), match))
    return placed


def _infer(layout: str, matches: Sequence[_Match], names: int) -> PoolFormerConfig:
    """The network that explains the matches."""
    placed = _stages(matches)
    count = 1 + max(stage for stage, _ in placed if stage is not None)
    depths: Counter[int] = Counter()
    votes: dict[tuple[int, str], Counter[int]] = defaultdict(Counter)
    kinds: dict[int, set[str]] = defaultdict(set)
    own_rows = parameter_rows()
    for stage, match in placed:
        at = count - 1 if stage is None else stage
        kinds[at].add(own_rows[match.row.path].when)
        # The highest index, not the number of them: a block that was lost is then reported as missing.
        depths[at] = max(depths[at], match.indices.get("b", -1) + 1)
        for symbol, size in _dimensions(match, own_rows[match.row.path].shape):
            votes[at, symbol][size] += 1
    if max(count, sum(depths.values())) > names:
        raise InputError(
            f"The stage and block numbers in these {names} names speak of {count} stages and {sum(depths.values())} "
            "blocks. Expected no more of them than there are arrays; the names are damaged."
        )
    return _config(layout, [depths[stage] for stage in range(count)], votes, kinds)


def _dimensions(match: _Match, symbols: tuple[str, ...]) -> list[tuple[str, int]]:
    """What each dimension of the array stands for and how long it is; none if the number of dimensions is wrong."""
    stand_in = np.broadcast_to(np.int8(0), (1,) * len(symbols))
    if len(match.shape) != TRANSFORMS[match.row.transform].there(stand_in).ndim or 0 in match.shape:
        return []
    shape = TRANSFORMS[match.row.transform].here(np.broadcast_to(np.int8(0), match.shape)).shape
    return list(zip(symbols, shape))


def _config(
    layout: str, depths: list[int], votes: Mapping[tuple[int, str], Counter[int]], kinds: Mapping[int, set[str]]
) -> PoolFormerConfig:
    """The network that won the votes."""

    def winner(stage: int, symbol: str) -> int | None:
        counter = votes.get((stage, symbol))
        return counter.most_common(1)[0][0] if counter else None

    stages = range(len(depths))
    widths = [winner(stage, "c") for stage in stages]
    if unknown := [stage for stage in stages if not widths[stage] or not depths[stage]]:
        raise InputError(
            f"This state dict in the layout of {layout} holds nothing of stage {', '.join(map(str, unknown))}, though "
            f"of others of its {len(depths)} stages. Expected every stage; give the file as it was saved."
        )
    mixers = tuple(_mixer(kinds[stage]) for stage in stages)
    embedded = tuple("position embedding" in kinds[stage] for stage in stages)
    patches = [winner(stage, "k") for stage in stages]
    architecture: dict[str, Any] = {
        "num_channels": winner(0, "i") or 3,
        "depths": tuple(depths),
        "hidden_sizes": tuple(widths),
        "mlp_ratio": _mlp_ratio([(c, m) for c, m in zip(widths, (winner(s, "m") for s in stages)) if c and m]),
        "token_mixers": mixers,
        "position_embeddings": embedded,
        # The published networks with attention normalise over channels, all others over the whole map; the arrays of
        # both norms are alike.
        "norm": "layer_norm" if "attention" in mixers else "group_norm",
        **_convolutions(patches),
    }
    architecture |= {
        "use_layer_scale": any("layer scale" in kind for kind in kinds.values()),
        "num_labels": winner(len(depths) - 1, "l") or 0,
        "head_order": LAYOUTS[layout].head_order or "norm_pool",
        "image_size": _image_size(architecture["strides"], winner, stages),
    }
    return _as_published(PoolFormerConfig(**architecture))


def _mlp_ratio(sizes: list[tuple[int, int]]) -> float:
    """The ratio that gives the hidden channels of most stages, which are int(channels * ratio)."""
    # m / c may fall a rounding error short of m when multiplied by c again; the next number does not.
    candidates = [r for c, m in sizes for r in (m / c, math.nextafter(m / c, math.inf))]
    return max(candidates, key=lambda ratio: sum(int(c * ratio) == m for c, m in sizes), default=4.0)


def _mixer(kinds: set[str]) -> str:
    # Pooling and identity hold no parameter, so that nothing tells them apart: PoolFormer is what we expect.
    return next((name for name in MIXER_PARAMETERS if name in kinds), "pooling")


def _convolutions(patches: list[int | None]) -> dict[str, tuple[int, ...]]:
    """Kernel, stride and padding per stage. Only kernels show in the arrays; the published ones tell the rest."""
    published = [(7, 4, 2)] + [(3, 2, 1)] * (len(patches) - 1)
    for stage, (patch, (kernel, *_)) in enumerate(zip(patches, published)):
        if patch not in (None, kernel):
            raise InputError(
                f"The convolution into stage {stage} has a kernel of {patch}, and stride and padding cannot be told "
                f"from a kernel. Expected the published {kernel}; for another network pass its PoolFormerConfig."
            )
    kernels, strides, padding = zip(*published)
    return {"patch_sizes": kernels, "strides": strides, "padding": padding}


def _image_size(strides: tuple[int, ...], winner: Any, stages: range) -> int | None:
    """The input side that position embeddings or spatial fc were made for; None if nothing fixes it."""
    for stage in stages:
        side = winner(stage, "h") or math.isqrt(winner(stage, "n") or 0)
        if side:
            return int(side) * math.prod(strides[: stage + 1])
    return None


def _as_published(config: PoolFormerConfig) -> PoolFormerConfig:
    """The same network; if it is a published one, with that one's remaining fields (initial layer scale)."""
    if (variant := published_variant(config)) is None:
        return config
    kept = ("num_labels", "head_order", "use_layer_scale", "image_size")
    return PoolFormerConfig.from_variant(variant, **{field: getattr(config, field) for field in kept})


def _unknown(shapes: Mapping[str, Shape]) -> str:
    shown = ", ".join(plain(name) for name in list(shapes)[:4]) or "nothing"
    return (
        f"These {len(shapes)} names are of no PoolFormer: {shown}, ... Expected those of sail "
        "('network.0.0.norm1.weight'), transformers ('poolformer.encoder.block.0.0.before_norm.weight'), timm "
        "('stages.0.blocks.0.norm1.weight') or this package ('stages_0/blocks_0/norm1/scale')."
    )

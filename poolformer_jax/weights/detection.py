"""Works out the network of a state dict from its matched names and its shapes alone.

Each dimension of each array votes for the size that the tables of `names.py` say it has (c channels, m hidden channels,
...), and the majority wins, so that one damaged array does not hide what the others say.
"""

import dataclasses
import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from poolformer_jax.errors import InputError
from poolformer_jax.network import MIXER_PARAMETERS, PoolFormerConfig, published_variant
from poolformer_jax.weights.matching import Match, MatchedNames
from poolformer_jax.weights.names import LAYOUTS, MLP, TRANSFORMS, parameter_rows


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


def _stages(matches: Sequence[Match]) -> list[tuple[int | None, Match]]:
    """Every match with the number of its stage; None if it has no stage."""
    # sail numbers the entries of one list. The n-th entry with blocks is stage n, and a downsampling or position
    # embedding belongs to the stage whose blocks follow it.
    blocks = sorted({m.indices["at"] for m in matches if "at" in m.indices})
    with_stages: list[tuple[int | None, Match]] = []
    for match in matches:
        place = next((match.indices[key] for key in ("at", "down", "pos") if key in match.indices), None)
        if place is not None:
            with_stages.append((bisect_left(blocks, place), match))
        else:
            with_stages.append((match.indices.get("s", 0 if match.row.path.startswith("stem") else None), match))
    return with_stages


def _dimensions(match: Match, symbols: tuple[str, ...]) -> list[tuple[str, int]]:
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

"""What the published networks are known by and their arrays do not say: their names, class names, preprocessing."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from poolformer_jax.errors import InputError
from poolformer_jax.images import PoolFormerImageProcessor, imagenet_labels
from poolformer_jax.network import PoolFormerConfig, published_variant

# The authors' ablations of a size whose arrays have the size's names and shapes (sail-sg/poolformer, README, Section 2,
# and its issues 9 and 46), by the words that name them, and what differs. None: what this version cannot compute.
_IDENTITY: Mapping[str, Any] = {"token_mixers": ("identity",) * 4}
_LAYER_NORM: Mapping[str, Any] = {"norm": "layer_norm"}
_SAME: Mapping[str, Any] = {}
_ABLATIONS: Mapping[str, Mapping[str, Any] | None] = {
    **dict.fromkeys(("id", "identity"), _IDENTITY),
    **dict.fromkeys(("ln", "layernorm"), _LAYER_NORM),
    **dict.fromkeys(("bn", "batchnorm"), None),
    **dict.fromkeys(("", "gn", "groupnorm", "pppa", "ppaa", "pppf", "ppff"), _SAME),  # their arrays tell them apart
}
_WORDS = "|".join(word for word in _ABLATIONS if word)
_NAME = re.compile(
    rf"(?<![a-z])(?:pool|meta)former[_-]?(?:(?P<before>[a-z]+)[_-])?(?P<size>[sm]\d\d)(?!\d)(?:[_-](?P<after>{_WORDS})(?![a-z]))?"
)


def changes_named(text: str) -> Mapping[str, Any] | None:
    """The fields in which the published network that `text` names differs from its size; None if it names none.

    Args:
        text: the name of a file, a folder or an architecture, such as "poolformer_ln_s12.pth.tar".

    Raises:
        InputError: if it names a network with BatchNorm.
    """
    match = _NAME.search(text.lower())
    if match is None or (word := match["before"] or match["after"] or "") not in _ABLATIONS:
        return None
    if (changes := _ABLATIONS[word]) is None:
        raise InputError(
            f"{text} names a network with BatchNorm, which computes another function than the norms that this version "
            "has: GroupNorm, and LayerNorm over channels. If it has one of these, pass variant=... or config=... "
            "(--variant on the command line)."
        )
    return changes


def published_config(name: str, **changes: Any) -> PoolFormerConfig:
    """As `PoolFormerConfig.from_variant`, with the ablations that differ in their norm ("poolformer_ln_s12") too."""
    match = _NAME.fullmatch(name)
    if match and (named := changes_named(name)):
        return PoolFormerConfig.from_variant(match["size"], **{**named, **changes})
    return PoolFormerConfig.from_variant(name, **changes)


def _variant(config: PoolFormerConfig) -> str | None:
    """The published name, of the size if only the norm differs."""
    return published_variant(config) or published_variant(dataclasses.replace(config, norm="group_norm"))


def class_names(config: PoolFormerConfig) -> dict[int, str]:
    """The config's class names; else ImageNet's for a published architecture with 1000 classes; else numbers."""
    if config.id2label is not None:
        return dict(config.id2label)
    if config.num_labels == 1000 and _variant(config) is not None:
        return imagenet_labels()
    return {index: f"class {index}" for index in range(config.num_labels)}


def default_image_processor(config: PoolFormerConfig) -> PoolFormerImageProcessor | None:
    """The preprocessing of the published variant of this architecture; None for other architectures."""
    variant = _variant(config)
    return None if variant is None else PoolFormerImageProcessor.for_variant(variant)

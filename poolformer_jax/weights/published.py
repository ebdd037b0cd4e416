"""What arrays do not show of a published network: its names, its class names, its preprocessing."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from poolformer_jax.errors import InputError
from poolformer_jax.images import PoolFormerImageProcessor, imagenet_labels
from poolformer_jax.network import FAMILIES, SIZES, VARIANTS, PoolFormerConfig, published_variant

# The authors' ablations whose arrays have the names and shapes of a published size (sail-sg/poolformer, README, Section
# 2, and its issues 9 and 46): the word in their name, and the fields that differ. None: this version cannot compute it.
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

# The second paper's networks whose arrays do not show whether they pool; their names do.
_SECOND_PAPER_NAME = re.compile(r"(?<![a-z])(poolformer[_-]?v2|identityformer)[_-]?([sm]\d\d)(?!\d)")


def is_pooling_open(config: PoolFormerConfig) -> bool:
    """True for a network inferred from arrays that PoolFormerV2 and IdentityFormer have alike."""
    return config.downsample_norm and "pooling" in config.token_mixers


def changes_named(text: str, config: PoolFormerConfig) -> Mapping[str, Any] | None:
    """The fields in which the published network that `text` names differs from `config`; None if it names none.

    `config` is the network that the arrays determine, with pooling where they leave it open. Raises InputError if it
    names a network with BatchNorm.
    """
    if config.downsample_norm:
        if not is_pooling_open(config):
            return _SAME
        family = _SECOND_PAPER_NAME.search(text.lower())
        return None if family is None else _IDENTITY if family[1] == "identityformer" else _SAME
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
    if match and (named := changes_named(name, PoolFormerConfig())):
        return PoolFormerConfig.from_variant(match["size"], **{**named, **changes})
    return PoolFormerConfig.from_variant(name, **changes)


# timm has neither the ablations nor IdentityFormer and RandFormer.
IN_TIMM = tuple(
    name
    for family in FAMILIES
    if family.title in ("PoolFormer", "PoolFormerV2", "ConvFormer", "CAFormer")
    for name in family.variants
)
# The files of the second paper's authors are in one repository on the Hub.
AUTHORS_REPOSITORY = "sail/dl"
# The second paper's checkpoints: what timm calls them, and the end of the authors' file name. Networks without an MLP
# head have only the first.
_CHECKPOINTS = {
    "sail_in1k": "",
    "sail_in1k_384": "_384",
    "sail_in22k_ft_in1k": "_in21ft1k",
    "sail_in22k_ft_in1k_384": "_384_in21ft1k",
    "sail_in22k": "_in21k",
}


def timms_name(variant: str) -> str:
    """The name of a published network for `timm.create_model`, if timm has it."""
    return f"poolformer_{variant}" if variant in SIZES else variant


def variants_like(config: PoolFormerConfig) -> tuple[str, ...]:
    """The published network with this architecture, or all networks of the same paper with the same token mixers."""
    if variant := published_variant(config):
        return (variant,)
    each = {name: PoolFormerConfig.from_variant(name) for name in VARIANTS}
    kind = (config.token_mixers, config.downsample_norm)
    return tuple(name for name, one in each.items() if (one.token_mixers, one.downsample_norm) == kind) or IN_TIMM


def names_on_the_hub() -> set[str]:
    """The published weights on the Hugging Face Hub: repositories, and files in the authors' repository `sail/dl`."""
    names = {name for size in SIZES.values() for name in size.weights}
    for family in FAMILIES:
        for variant, fields in family.variants.items():
            if fields.get("downsample_norm"):
                kept = None if fields.get("head") == "mlp" else 1
                for tag, ending in list(_CHECKPOINTS.items())[:kept]:
                    names |= {f"timm/{variant}.{tag}"} if variant in IN_TIMM else set()
                    names.add(f"{AUTHORS_REPOSITORY}/{variant.split('_')[0]}/{variant}{ending}.pth")
    return names


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


def default_image_processor(config: PoolFormerConfig, names: Iterable[str] = ()) -> PoolFormerImageProcessor | None:
    """The preprocessing of the published variant of this architecture; None for other architectures.

    Args:
        config: the network.
        names: what the weights are called. Published names of networks trained with 384 pixels end so, or have it
            before "_in21ft1k": the pictures have this size then, and otherwise 224.
    """
    if (variant := _variant(config)) is None:
        return None
    with_384 = re.compile(rf"{variant}[._](?:.*_)?384(?!\d)")
    changes = {"size": 384, "crop_size": 384} if any(with_384.search(name.lower()) for name in names) else {}
    return PoolFormerImageProcessor.for_variant(variant, **changes)

"""The published networks as data: what differs from the config's defaults, the reported accuracy, the Hub names.

Sources of the first paper's: arXiv 2111.11418, Tables 1 and 2 (the five sizes) and 5 (the ablations);
sail-sg/poolformer: README, Section 2, "PoolFormer Models" (top-1 on ImageNet-1k's validation images at 224 x 224, MACs
counted by fvcore), models/poolformer.py and models/metaformer.py. Of the second paper's (arXiv 2210.13452):
sail-sg/metaformer, README and metaformer_baselines.py.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

SOURCE = "README of sail-sg/poolformer (ImageNet-1k, 224 x 224)"
SECOND_SOURCE = "README of sail-sg/metaformer (ImageNet-1k)"


class Size(NamedTuple):
    """One size of PoolFormer."""

    name: str  # "s12" and so on
    depths: tuple[int, ...]  # blocks per stage
    hidden_sizes: tuple[int, ...]  # channels per stage
    layer_scale_init_value: float  # the authors start layer scale at 1e-6 from s36 on
    top_1: float  # ImageNet-1k accuracy in percent
    macs_g: float  # multiply-accumulate operations for an image of 224 x 224, in billions

    @property
    def weights(self) -> tuple[str, str]:
        """The names of its weights on the Hugging Face Hub."""
        return f"sail/poolformer_{self.name}", f"timm/poolformer_{self.name}.sail_in1k"

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of `PoolFormerConfig` that make this size."""
        return {name: getattr(self, name) for name in ("depths", "hidden_sizes", "layer_scale_init_value")}


_SMALL, _MEDIUM = (64, 128, 320, 512), (96, 192, 384, 768)

SIZES: Mapping[str, Size] = {
    size.name: size
    for size in (
        Size("s12", (2, 2, 6, 2), _SMALL, 1e-5, 77.2, 1.8),
        Size("s24", (4, 4, 12, 4), _SMALL, 1e-5, 80.3, 3.4),
        Size("s36", (6, 6, 18, 6), _SMALL, 1e-6, 81.4, 5.0),
        Size("m36", (6, 6, 18, 6), _MEDIUM, 1e-6, 82.1, 8.8),
        Size("m48", (8, 8, 24, 8), _MEDIUM, 1e-6, 82.5, 11.6),
    )
}


def _ablation(*token_mixers: str, **fields: Any) -> dict[str, Any]:
    return {**SIZES["s12"].fields, "token_mixers": token_mixers, **fields}


# The names of the ablations list the mixers: i = identity, p = pooling, a = attention, f = spatial fc.
_ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "metaformer_id_s12": _ablation("identity", "identity", "identity", "identity"),
    "metaformer_pppa_s12_224": _ablation(
        *("pooling", "pooling", "pooling", "attention"),
        position_embeddings=(False, False, False, True),
        norm="layer_norm",
        image_size=224,
    ),
    "metaformer_ppaa_s12_224": _ablation(
        *("pooling", "pooling", "attention", "attention"),
        position_embeddings=(False, False, True, False),
        norm="layer_norm",
        image_size=224,
    ),
    "metaformer_pppf_s12_224": _ablation("pooling", "pooling", "pooling", "spatial_fc", image_size=224),
    "metaformer_ppff_s12_224": _ablation("pooling", "pooling", "spatial_fc", "spatial_fc", image_size=224),
}


class Result(NamedTuple):
    """What the authors report of one network at one image size."""

    image_size: int  # side of the images in pixels
    # Multiply-accumulate operations for an image, in billions, counted by fvcore. It does not see the norms of the
    # second paper, which the authors write by hand.
    macs_g: float
    top_1: float  # ImageNet-1k accuracy in percent, trained from scratch
    top_1_in21k: float | None = None  # the same, pretrained on ImageNet-21k; None if it is not published


class Family(NamedTuple):
    """The published networks of one kind."""

    title: str  # the name that the paper gives to the kind
    variants: Mapping[str, Mapping[str, Any]]  # the fields of `MetaFormerConfig` for every network, by its name
    results: Mapping[str, tuple[Result, ...]]  # what the authors report, by the same names; of the ablations nothing
    source: str  # where they report it


# Depths and widths. "s36" and "m36" stand for other sizes in the two halves of the second paper.
_SIZES_OF_SIMPLE_MIXERS = {size.name: (size.depths, size.hidden_sizes) for size in SIZES.values()}
_SIZES_WITH_CONVOLUTIONS = {
    "s18": ((3, 3, 9, 3), _SMALL),
    "s36": ((3, 12, 18, 3), _SMALL),
    "m36": ((3, 12, 18, 3), (96, 192, 384, 576)),
    "b36": ((3, 12, 18, 3), (128, 256, 512, 768)),
}
# What all networks of the second paper share.
_SECOND_PAPER: Mapping[str, Any] = {
    "norm_bias": False,
    "norm_epsilon": 1e-6,
    "downsample_norm": True,
    "hidden_act": "star_relu",
    "mlp_bias": False,
    "attention_bias": False,
    "use_layer_scale": False,
    "residual_scale_init_values": (None, None, 1.0, 1.0),
    "head_order": "pool_norm",
    "convolution_init": "normal",
}


def _family(
    title: str,
    sizes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    results: Mapping[str, tuple[Result, ...]],
    *token_mixers: str,
    **fields: Any,
) -> Family:
    """The family `title` in some sizes, with what the authors report of each size."""
    own = {**_SECOND_PAPER, "token_mixers": token_mixers, **fields}
    name = title.lower()
    variants = {
        f"{name}_{size}": {"depths": depths, "hidden_sizes": widths, **own} for size, (depths, widths) in sizes.items()
    }
    return Family(title, variants, {f"{name}_{size}": results[size] for size in sizes}, SECOND_SOURCE)


def _at_224(macs_g: tuple[float, ...], top_1: tuple[float, ...]) -> dict[str, tuple[Result, ...]]:
    return {
        size: (Result(224, macs, accuracy),) for size, macs, accuracy in zip(_SIZES_OF_SIMPLE_MIXERS, macs_g, top_1)
    }


FAMILIES: tuple[Family, ...] = (
    Family(
        "PoolFormer",
        {name: size.fields for name, size in SIZES.items()},
        {name: (Result(224, size.macs_g, size.top_1),) for name, size in SIZES.items()},
        SOURCE,
    ),
    Family("Ablations of PoolFormer-S12", _ABLATIONS, {}, SOURCE),
    _family(
        "IdentityFormer",
        _SIZES_OF_SIMPLE_MIXERS,
        _at_224((1.8, 3.4, 5.0, 8.8, 11.5), (74.6, 78.2, 79.3, 80.0, 80.4)),
        *("identity",) * 4,
    ),
    _family(
        "RandFormer",
        _SIZES_OF_SIMPLE_MIXERS,
        _at_224((1.9, 3.5, 5.2, 9.0, 11.9), (76.6, 78.2, 79.5, 81.2, 81.4)),
        *("identity", "identity", "random", "random"),
        image_size=224,
    ),
    _family(
        "PoolFormerV2",
        _SIZES_OF_SIMPLE_MIXERS,
        _at_224((1.8, 3.4, 5.0, 8.8, 11.5), (78.0, 80.7, 81.6, 82.2, 82.6)),
        *("pooling",) * 4,
    ),
    _family(
        "ConvFormer",
        _SIZES_WITH_CONVOLUTIONS,
        {
            "s18": (Result(224, 3.9, 83.0, 83.7), Result(384, 11.6, 84.4, 85.0)),
            "s36": (Result(224, 7.6, 84.1, 85.4), Result(384, 22.4, 85.4, 86.4)),
            "m36": (Result(224, 12.8, 84.5, 86.1), Result(384, 37.7, 85.6, 86.9)),
            "b36": (Result(224, 22.6, 84.8, 87.0), Result(384, 66.5, 85.7, 87.6)),
        },
        *("sep_conv",) * 4,
        norm="layer_norm",
        head="mlp",
    ),
    _family(
        "CAFormer",
        _SIZES_WITH_CONVOLUTIONS,
        {
            "s18": (Result(224, 4.1, 83.6, 84.1), Result(384, 13.4, 85.0, 85.4)),
            "s36": (Result(224, 8.0, 84.5, 85.8), Result(384, 26.0, 85.7, 86.9)),
            "m36": (Result(224, 13.2, 85.2, 86.6), Result(384, 42.0, 86.2, 87.5)),
            "b36": (Result(224, 23.2, 85.5, 87.4), Result(384, 72.2, 86.4, 88.1)),
        },
        *("sep_conv", "sep_conv", "attention", "attention"),
        norm="layer_norm",
        head="mlp",
    ),
)

# The fields of every published network, by its name.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    name: fields for family in FAMILIES for name, fields in family.variants.items()
}


class Baseline(NamedTuple):
    """A baseline by other authors in the first paper's abstract, beside PoolFormer-M36, at 224 x 224 pixels."""

    parameters: int  # their number with 1000 labels
    macs: int  # multiply-accumulate operations by fvcore's rules
    top_1: float  # ImageNet-1k accuracy in percent, as the paper cites it


# timm's deit_base_patch16_224; and ResMLP-B24 with patches of 16 pixels. timm's resmlp_big_24_224 has patches of 8.
BASELINES: Mapping[str, Baseline] = {
    "DeiT-B": Baseline(86_567_656, 17_582_740_224, 81.8),
    "ResMLP-B24": Baseline(115_736_776, 23_020_713_984, 81.0),
}

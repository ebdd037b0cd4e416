"""The published networks as data: what differs from the config's defaults, the reported accuracy, the Hub names.

Sources: arXiv 2111.11418, Tables 1 and 2 (the five sizes) and 5 (the ablations); sail-sg/poolformer: README, Section 2,
"PoolFormer Models" (top-1 on ImageNet-1k's validation images at 224 x 224, MACs counted by fvcore),
models/poolformer.py and models/metaformer.py.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

SOURCE = "README of sail-sg/poolformer (ImageNet-1k, 224 x 224)"


class Size(NamedTuple):
    """One size of PoolFormer.

    Attributes:
        name: "s12" and so on.
        depths: blocks per stage.
        hidden_sizes: channels per stage.
        layer_scale_init_value: the authors start layer scale at 1e-6 from s36 on.
        top_1: ImageNet-1k accuracy in percent.
        macs_g: multiply-accumulate operations for an image of 224 x 224, in billions.
    """

    name: str
    depths: tuple[int, ...]
    hidden_sizes: tuple[int, ...]
    layer_scale_init_value: float
    top_1: float
    macs_g: float

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


# The fields of every published network. The names of the ablations list the mixers: i = identity, p = pooling,
# a = attention, f = spatial fc.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    **{name: size.fields for name, size in SIZES.items()},
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

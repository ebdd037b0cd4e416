"""What the authors and the paper report about their networks, for tables and for recognising weights.

Sources: README of sail-sg/poolformer, Section 2, "PoolFormer Models" (top-1 on ImageNet-1k's validation images at
224 x 224, MACs counted by fvcore), and Table 2 of arXiv 2111.11418.
"""

from collections.abc import Mapping
from typing import NamedTuple

from poolformer_jax.network.config import VARIANTS, PoolFormerConfig

SOURCE = "README of sail-sg/poolformer (ImageNet-1k, 224 x 224)"


class PublishedResult(NamedTuple):
    """ImageNet-1k top-1 in percent, and multiply-accumulate operations in billions."""

    top_1: float
    macs_g: float


RESULTS: Mapping[str, PublishedResult] = {
    "s12": PublishedResult(77.2, 1.8),
    "s24": PublishedResult(80.3, 3.4),
    "s36": PublishedResult(81.4, 5.0),
    "m36": PublishedResult(82.1, 8.8),
    "m48": PublishedResult(82.5, 11.6),
}

_ARCHITECTURE = (
    "depths",
    "hidden_sizes",
    "mlp_ratio",
    "hidden_act",
    "pool_size",
    "token_mixers",
    "position_embeddings",
    "num_channels",
    "patch_sizes",
    "strides",
    "padding",
    "norm",
)


def published_variant(config: PoolFormerConfig) -> str | None:
    """The name of the published network with this architecture, whatever its head; None if there is none."""
    for name in VARIANTS:
        published = PoolFormerConfig.from_variant(name)
        if all(getattr(config, field) == getattr(published, field) for field in _ARCHITECTURE):
            return name
    return None

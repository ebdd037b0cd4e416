"""Which published network a config is."""

import dataclasses
import functools
from typing import Any

from poolformer_jax.network.config import MetaFormerConfig
from poolformer_jax.network.variants import VARIANTS

# Fields that do not make a network another one: labels, rates, initial values, what callers get back, and what weights
# in another layout may choose (`use_layer_scale`, `head_order`, `head_norm_epsilon`, `image_size`).
_NOT_ARCHITECTURE = {
    *("num_labels", "id2label", "problem_type", "output_hidden_states", "return_dict"),
    *("drop_path_rate", "dropout_rate", "head_dropout_rate", "layer_scale_init_value", "convolution_init"),
    *("use_layer_scale", "head_order", "head_norm_epsilon", "image_size"),
}
_ARCHITECTURE = [field.name for field in dataclasses.fields(MetaFormerConfig) if field.name not in _NOT_ARCHITECTURE]


def published_variant(config: MetaFormerConfig) -> str | None:
    """The name of the published network with this architecture, whatever its head; None if it is not published."""
    return _published_architectures().get(_architecture(config))


def describe_network(config: MetaFormerConfig) -> str:
    """The published name or the sizes of a network, and its number of labels: "s12, 1000 labels"."""
    sizes = published_variant(config) or f"depths {config.depths}, hidden sizes {config.hidden_sizes}"
    return f"{sizes}, {config.num_labels} labels" if config.num_labels else sizes


@functools.cache
def _published_architectures() -> dict[tuple[Any, ...], str]:
    return {_architecture(MetaFormerConfig.from_variant(name)): name for name in VARIANTS}


def _architecture(config: MetaFormerConfig) -> tuple[Any, ...]:
    return tuple(getattr(config, name) for name in _ARCHITECTURE)

"""From the last feature map to logits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from poolformer_jax.network.config import PoolFormerConfig
from poolformer_jax.network.functional import NORMS, POOLED_EPSILON, dense, layer_norm, widen
from poolformer_jax.network.layers import Params


def classify(
    config: PoolFormerConfig,
    params: Params,
    features: Float[Array, "b h w c"],
    dropout: Callable[[Array], Array] = lambda x: x,
) -> Float[Array, "b outputs"]:
    """The final norm, the mean over positions, and the head.

    Args:
        config: the architecture; `head_order` says which comes first, norm or mean.
        params: `norm` {scale, bias}, and if the network has labels `head`: {kernel, bias}, or {fc1, norm, fc2}.
        features: the last feature map.
        dropout: applied before the head's last dense layer, where the authors of the second paper apply it.

    Returns:
        The logits in at least float32, or without labels the pooled, normalised features. A float32 head costs nothing
        where feature maps are bfloat16, and its gradients add up with all others.
    """
    if config.head_order == "norm_pool":
        pooled = NORMS[config.norm](features, **params["norm"], epsilon=config.norm_epsilon).mean((1, 2))
    else:
        pooled = layer_norm(features.mean((1, 2)), **params["norm"], epsilon=POOLED_EPSILON)
    pooled = widen(pooled)
    return classify_features(config, params["head"], pooled, dropout) if "head" in params else pooled


def classify_features(
    config: PoolFormerConfig,
    head: Params,
    features: Float[Array, "b c"],
    dropout: Callable[[Array], Array] = lambda x: x,
) -> Float[Array, "b labels"]:
    """The logits of pooled, normalised features; the arguments are as in `classify`."""
    if config.head == "linear":
        return dense(dropout(features), **head)
    hidden = jnp.square(jax.nn.relu(dense(features, **head["fc1"])))
    normed = layer_norm(hidden, **head["norm"], epsilon=config.head_norm_epsilon)
    return dense(dropout(normed), **head["fc2"])

"""From the last feature map to logits, and from logits to the loss."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from poolformer_jax.errors import InputError
from poolformer_jax.network.config import PoolFormerConfig
from poolformer_jax.network.functional import NORMS, POOLED_EPSILON, cross_entropy, dense, layer_norm, widen
from poolformer_jax.network.layers import Params

# As the classifier takes them; `mean_loss` says more than an annotation can.
Labels = Num[Array | np.ndarray, "..."]


def classify(config: PoolFormerConfig, params: Params, features: Float[Array, "b h w c"]) -> Float[Array, "b outputs"]:
    """The final norm, the mean over positions, and the linear head.

    Args:
        config: the architecture; `head_order` says which comes first, norm or mean.
        params: `norm` {scale, bias}, and `head` {kernel, bias} if the network has labels.
        features: the last feature map.

    Returns:
        The logits in at least float32, or without labels the pooled, normalised features. A float32 head costs nothing
        where feature maps are bfloat16, and its gradients add up with all others.
    """
    if config.head_order == "norm_pool":
        pooled = NORMS[config.norm](features, **params["norm"]).mean((1, 2))
    else:
        pooled = layer_norm(features.mean((1, 2)), **params["norm"], epsilon=POOLED_EPSILON)
    pooled = widen(pooled)
    return dense(pooled, **params["head"]) if "head" in params else pooled


def mean_loss(
    config: PoolFormerConfig, logits: Float[Array, "b labels"], labels: Num[Array, "..."]
) -> Float[Array, ""]:
    """The mean cross entropy, in nats, for the class index or the class probabilities of every image.

    Raises:
        ValueError: for labels of another shape, which could be broadcast against the logits without an error.
    """
    if config.num_labels == 0:
        raise InputError("labels were given, and the network has no head (num_labels=0). Expected labels=None.")
    indices = labels.shape == logits.shape[:1] and jnp.issubdtype(labels.dtype, jnp.integer)
    if not indices and labels.shape != logits.shape:
        batch, classes = logits.shape
        raise InputError(
            f"labels has shape {labels.shape} and type {labels.dtype}, for a batch of {batch} and {classes} classes. "
            f"Expected whole numbers [{batch}], the class of each image, or a probability for each class "
            f"[{batch}, {classes}]."
        )
    return cross_entropy(logits, labels).mean()

"""From logits to the loss and to probabilities, by the problem that the config names."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from poolformer_jax.errors import InputError
from poolformer_jax.network.config import PoolFormerConfig
from poolformer_jax.network.functional import cross_entropy, widen

# As the classifier takes them; `mean_loss` says more than an annotation can.
Labels = Num[Array | np.ndarray, "..."]
_IGNORED = -100  # the index of images without a label, in PyTorch and transformers


def mean_loss(
    config: PoolFormerConfig, logits: Float[Array, "b labels"], labels: Num[Array, "..."]
) -> Float[Array, ""]:
    """The loss of `config.problem_type` as in `transformers` (ForSequenceClassificationLoss), in at least float32.

    - None or "single_label_classification": mean cross entropy in nats, for a class index or class probabilities of
      every image. Images with the index -100 are left out.
    - "multi_label_classification": mean binary cross entropy in nats, for a 0 or 1 for every image and class.
    - "regression", and None with a single label: mean squared error; of a single output also for labels [batch].

    One difference: without a problem_type `transformers` takes class probabilities for the labels of a multi-label
    problem. Raises ValueError for labels of another shape, which could be broadcast against the logits without an
    error.
    """
    if config.num_labels == 0:
        raise InputError("labels were given, and the network has no head (num_labels=0). Expected labels=None.")
    batch, classes = logits.shape
    problem = resolved_problem_type(config)
    if problem == "regression" and classes == 1 and labels.shape == (batch,):
        labels = labels[:, None]
    indices = (
        problem == "single_label_classification"
        and labels.shape == (batch,)
        and jnp.issubdtype(labels.dtype, jnp.integer)
    )
    if not indices and labels.shape != logits.shape:
        expected = {
            "single_label_classification": f"whole numbers [{batch}], the class of each image, or a probability for "
            f"each class [{batch}, {classes}]",
            "multi_label_classification": f"a 0 or 1 for each class [{batch}, {classes}]",
            "regression": f"numbers [{batch}, {classes}]" + (f" or [{batch}]" if classes == 1 else ""),
        }
        raise InputError(
            f"labels has shape {labels.shape} and type {labels.dtype}, for a batch of {batch} and {classes} classes. "
            f"Expected {expected[problem]}."
        )
    if indices:
        return cross_entropy(logits, labels).mean(where=labels.astype(int) != _IGNORED)
    if problem == "single_label_classification":
        return cross_entropy(logits, labels).mean()
    logits = widen(logits)
    labels = labels.astype(logits.dtype)
    if problem == "regression":
        return jnp.square(logits - labels).mean()
    return (jax.nn.softplus(logits) - labels * logits).mean()


def resolved_problem_type(config: PoolFormerConfig) -> str:
    """`config.problem_type`; if it is None, what the loss of `transformers` takes it for: one label is a regression."""
    return config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")


def check_has_probabilities(config: PoolFormerConfig) -> None:
    """Raises ValueError for a network without a head and for a regression, whose outputs are not probabilities."""
    if config.num_labels == 0:
        raise InputError("The network has no head (num_labels=0). Expected a classifier.")
    if resolved_problem_type(config) == "regression":
        raise InputError(
            f"problem_type={config.problem_type!r} with num_labels={config.num_labels} is a regression, which has no "
            "probabilities. Expected a classifier; problem_type='multi_label_classification' gives one label a sigmoid."
        )


def probabilities(config: PoolFormerConfig, logits: Float[Array, "*b labels"]) -> Float[Array, "*b labels"]:
    """The probability of each class: a softmax, or for "multi_label_classification" independent sigmoids.

    Raises ValueError as `check_has_probabilities`.
    """
    check_has_probabilities(config)
    return (jax.nn.sigmoid if config.problem_type == "multi_label_classification" else jax.nn.softmax)(logits)

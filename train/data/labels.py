"""Compares the labels of a model with the classes of a data set."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from poolformer_jax import PoolFormerConfig
from poolformer_jax.errors import InputError
from poolformer_jax.images import imagenet_labels, imagenet_wordnet_ids
from poolformer_jax.weights import class_names as names_of_classes

_MAX_LISTED = 10
# `prepare` adds the id to the two classes of ImageNet that are both called crane.
_WORDNET_ID = re.compile(r" \(n\d{8}\)$")


def match_labels(config: PoolFormerConfig, class_names: Sequence[str]) -> Int[np.ndarray, " classes"] | None:
    """The model's label for every class of the data; None unless the data has a subset of the model's classes.

    Matches the model's class names, and for ImageNet also WordNet ids, because the folders of its subsets (Imagenette,
    ImageNet-A, ImageNet-R) are named n01440764 and so on.
    """
    if len(class_names) >= config.num_labels:
        return None
    names = names_of_classes(config)
    counts = Counter(names.values())
    label_of = {name: label for label, name in names.items() if counts[name] == 1}
    wordnet_ids = imagenet_wordnet_ids()
    for label, name in imagenet_labels().items():
        if names.get(label) == name:
            label_of |= {wordnet_ids[label]: label, f"{name} ({wordnet_ids[label]})": label}
    if not set(class_names) <= label_of.keys():
        return None
    return np.array([label_of[name] for name in class_names], np.int32)


def check_same_classes(
    source: str, config: PoolFormerConfig, data: str, class_names: Sequence[str], remedy: str
) -> None:
    """Checks that a model's labels have the same names as the data's classes.

    If no name is in both lists, only the number of classes is compared: the folders of ImageNet have WordNet ids, its
    labels have words.

    Args:
        source: the model, for messages.
        config: the model's config.
        data: the data, for messages.
        class_names: the data's classes, in the order of its labels.
        remedy: an alternative to renaming, for messages.

    Raises:
        ValueError: with both numbers of classes, or the labels that differ.
    """
    if config.num_labels != len(class_names):
        raise InputError(
            f"{source} has {config.num_labels} classes, and {data} has {len(class_names)}. Expected the same classes; "
            f"{remedy}."
        )
    if config.id2label is None:
        return
    names = [config.id2label[label] for label in range(config.num_labels)]
    model_names, data_names = [[_WORDNET_ID.sub("", name) for name in each] for each in (names, class_names)]
    if model_names == data_names or not set(model_names) & set(data_names):
        return
    same = sorted(model_names) == sorted(data_names)
    what = "the same classes in another order" if same else "only some classes in common"
    different = [label for label, (one, other) in enumerate(zip(model_names, data_names)) if one != other]
    lines = [f"label {label}: {names[label]} in the model, {class_names[label]} in the data" for label in different]
    more = [f"and {len(lines) - _MAX_LISTED} more"] if len(lines) > _MAX_LISTED else []
    raise InputError(
        f"{source} and {data} have {what}, so that their labels differ:\n  "
        + "\n  ".join(lines[:_MAX_LISTED] + more)
        + f"\nExpected the same classes in the same order (class folders: sorted by name). Rename them, or {remedy}."
    )

"""Whether the labels of a model mean the classes of a data set."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from poolformer_jax import PoolFormerConfig
from poolformer_jax.errors import InputError
from poolformer_jax.images.imagenet_labels import imagenet_labels, imagenet_wordnet_ids
from poolformer_jax.inference.classifier import class_names as names_of_classes

# Classes that a message about differing ones lists.
_MOST_LINES = 10
# What `prepare` adds to the two classes of ImageNet that are both called crane.
_WORDNET_ID = re.compile(r" \(n\d{8}\)$")


def labels_of_some(config: PoolFormerConfig, class_names: Sequence[str]) -> Int[np.ndarray, " classes"] | None:
    """The model's label of every class of the data; None unless the data has a part of the model's classes.

    Classes are found by the model's names for them, and ImageNet's by their WordNet ids too: folders of a part of it
    (Imagenette, ImageNet-A, ImageNet-R) are called n01440764 and so on.
    """
    if len(class_names) >= config.num_labels:
        return None
    names = names_of_classes(config)
    named = Counter(names.values())
    label_of = {name: label for label, name in names.items() if named[name] == 1}
    wordnet_ids = imagenet_wordnet_ids()
    for label, name in imagenet_labels().items():
        if names.get(label) == name:
            label_of |= {wordnet_ids[label]: label, f"{name} ({wordnet_ids[label]})": label}
    if not set(class_names) <= label_of.keys():
        return None
    return np.array([label_of[name] for name in class_names], np.int32)


def refuse_other_classes(
    source: str, config: PoolFormerConfig, data: str, class_names: Sequence[str], remedy: str
) -> None:
    """Checks that a model's labels mean the data's classes, as far as their names can tell.

    Lists without a name in common are two vocabularies: ImageNet's folders are called by WordNet ids and its labels by
    words, and only the number of classes can be compared. With one in common they have to be equal.

    Args:
        source: the model, for messages.
        config: of the model.
        data: the data, for messages.
        class_names: the data's, in the order of its labels.
        remedy: what else can be done than renaming.

    Raises:
        ValueError: with both numbers of classes, or naming the labels that differ.
    """
    if config.num_labels != len(class_names):
        raise InputError(
            f"{source} tells {config.num_labels} classes apart, and {data} has {len(class_names)}. Expected the same "
            f"classes; {remedy}."
        )
    if config.id2label is None:
        return
    names = [config.id2label[label] for label in range(config.num_labels)]
    plain, wanted = [[_WORDNET_ID.sub("", name) for name in one] for one in (names, class_names)]
    if plain == wanted or not set(plain) & set(wanted):
        return
    what = "the same classes in another order" if sorted(plain) == sorted(wanted) else "some classes in common only"
    different = [label for label, (one, other) in enumerate(zip(plain, wanted)) if one != other]
    lines = [f"label {label}: {names[label]} in the model, {class_names[label]} in the data" for label in different]
    more = [f"and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    raise InputError(
        f"{source} and {data} have {what}, so labels would not agree:\n  "
        + "\n  ".join(lines[:_MOST_LINES] + more)
        + f"\nExpected the same classes in the same order (class folders: sorted by name). Rename them, or {remedy}."
    )

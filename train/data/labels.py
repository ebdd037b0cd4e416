"""Compares the labels of a model with the classes of a data set."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from poolformer_jax import PoolFormerConfig
from poolformer_jax.errors import InputError
from poolformer_jax.images import imagenet_labels, imagenet_wordnet_ids
from poolformer_jax.messages import first_few
from poolformer_jax.weights import class_names as names_of_classes
from train.data.sources.folders import natural_key

_MAX_LISTED = 10
# `prepare` adds the id to the two classes of ImageNet that are both called crane.
_WORDNET_ID = re.compile(r" \(n\d{8}\)$")


def match_labels(config: PoolFormerConfig, class_names: Sequence[str]) -> Int[np.ndarray, " classes"] | None:
    """The model's label for every class of the data, by name; None if the model lacks a name.

    Matches the model's class names, and for ImageNet's classes also WordNet ids, because the folders of ImageNet and of
    its subsets (Imagenette, ImageNet-A, ImageNet-R) are named n01440764 and so on.
    """
    names = names_of_classes(config)
    label_of = _unique(names)
    words, wordnet_ids = imagenet_labels(), imagenet_wordnet_ids()
    unique_words = _unique(words)
    for number, word in words.items():
        if names.get(number) == word:
            label = number
        elif word in unique_words and word in label_of:
            label = label_of[word]
        else:
            continue
        label_of |= {wordnet_ids[number]: label, f"{word} ({wordnet_ids[number]})": label}
    labels = [label_of[name] for name in class_names if name in label_of]
    return np.array(labels, np.int32) if len(set(labels)) == len(class_names) else None


def check_same_classes(
    source: str,
    config: PoolFormerConfig,
    data: str,
    class_names: Sequence[str],
    remedy: str,
    order_is_given: bool = False,
) -> None:
    """Checks that a model's labels are the data's, as far as their names show.

    Names that differ completely agree only if the data's are the numbers 0, 1, 2, ... or ImageNet's WordNet ids. A
    model without names agrees with any data whose classes have one order: by text (as torchvision sorts folders) and by
    number (as timm does).

    `remedy` is an alternative to renaming, for messages. If a class map says which label each class has
    (`order_is_given`), only contradictions are errors. Raises ValueError with both numbers of classes, the labels that
    differ, or the names that cannot be compared.
    """
    if config.num_labels != len(class_names):
        raise InputError(
            f"{source} has {config.num_labels} classes, and {data} has {len(class_names)}. Expected the same classes; "
            f"{remedy}."
        )
    names = [name for _, name in sorted(names_of_classes(config).items())]
    model_names, data_names = _without_wordnet_ids(names), _without_wordnet_ids(class_names)
    matched = match_labels(config, class_names)
    if model_names == data_names or (matched is not None and np.array_equal(matched, np.arange(len(names)))):
        return
    if set(model_names) & set(data_names):
        contradicts = any(one != other and other in model_names for one, other in zip(model_names, data_names))
        if not order_is_given or contradicts:
            _refuse_other_labels(source, data, names, class_names, remedy)
    elif not order_is_given and not _has_known_order(names, class_names):
        raise InputError(
            f"The classes of {source} ({first_few(names)}) and of {data} ({first_few(class_names)}) cannot be compared "
            "by name, and so their order may differ. Expected the label of each class with --data.class-map FILE (in "
            "evaluate: --class-map): a text file with one class of the data per line, in the order of the model's "
            f"labels, or JSON {{name: label}}. Or {remedy}."
        )


def _unique(names: Mapping[int, str]) -> dict[str, int]:
    """The labels of the names that only one class has."""
    counts = Counter(names.values())
    return {name: label for label, name in names.items() if counts[name] == 1}


def _without_wordnet_ids(names: Sequence[str]) -> list[str]:
    return [_WORDNET_ID.sub("", name) for name in names]


def _has_known_order(names: Sequence[str], class_names: Sequence[str]) -> bool:
    """True if the classes of the data, which share no name with the model's, can only have the model's order."""
    if all(name in (f"LABEL_{label}", f"class {label}") for label, name in enumerate(names)):  # a model without names
        by_number = sorted(class_names, key=natural_key)
        return list(class_names) != by_number or by_number == sorted(class_names)
    if all(name.isascii() and name.isdigit() and int(name) == label for label, name in enumerate(class_names)):
        return True
    return list(class_names) == list(imagenet_wordnet_ids().values())


def _refuse_other_labels(source: str, data: str, names: Sequence[str], class_names: Sequence[str], remedy: str) -> None:
    model_names, data_names = _without_wordnet_ids(names), _without_wordnet_ids(class_names)
    same = sorted(model_names) == sorted(data_names)
    what = "the same classes in another order" if same else "only some classes in common"
    different = [label for label, (one, other) in enumerate(zip(model_names, data_names)) if one != other]
    lines = [f"label {label}: {names[label]} in the model, {class_names[label]} in the data" for label in different]
    more = [f"and {len(lines) - _MAX_LISTED} more"] if len(lines) > _MAX_LISTED else []
    raise InputError(
        f"{source} and {data} have {what}, so that their labels differ:\n  "
        + "\n  ".join(lines[:_MAX_LISTED] + more)
        + "\nExpected the same classes in the same order (class folders: sorted by name, numbers by value). Rename "
        f"them, give their labels with --data.class-map FILE (in evaluate: --class-map), or {remedy}."
    )

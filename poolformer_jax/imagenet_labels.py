"""The names of ImageNet-1k's classes, for published weights that come without any.

`imagenet_labels.txt` has one class per line in the order of the published heads, ImageNet's synsets sorted by number
(n01440764 first): the lemmas that WordNet 3.0 has for the synset, separated by commas. These are the strings that the
`id2label` of models on the Hub has too. Taken from `timm` 1.0.31, data/_info/imagenet_synsets.txt and
imagenet_synset_to_lemma.txt. One name, "crane", belongs to two classes: the bird (134) and the machine (517).
"""

from importlib import resources


def imagenet_labels() -> dict[int, str]:
    """The 1000 class names by index."""
    lines = resources.files("poolformer_jax").joinpath("imagenet_labels.txt").read_text(encoding="utf-8").splitlines()
    return dict(enumerate(lines))

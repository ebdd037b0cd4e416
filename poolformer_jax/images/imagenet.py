"""Names of the ImageNet-1k classes, for published weights that do not contain them.

`imagenet_labels.txt` has one class per line, in the order of the published heads (synsets sorted by id): the WordNet
id, which is also the name of ImageNet's folder, and the synset's lemmas in WordNet 3.0, separated by commas. The lemmas
equal the `id2label` of models on the Hub. Source: `timm` 1.0.31, data/_info/imagenet_synsets.txt and
imagenet_synset_to_lemma.txt. Two classes are called "crane": the bird (134) and the machine (517).
"""

from importlib import resources


def imagenet_labels() -> dict[int, str]:
    """The 1000 class names by index."""
    return {label: name for label, (_, name) in enumerate(_synsets())}


def imagenet_wordnet_ids() -> dict[int, str]:
    """The 1000 WordNet ids by index: "n01440764" is the first."""
    return {label: wordnet_id for label, (wordnet_id, _) in enumerate(_synsets())}


def _synsets() -> list[tuple[str, str]]:
    text = resources.files("poolformer_jax.images").joinpath("imagenet_labels.txt").read_text(encoding="utf-8")
    return [(wordnet_id, name) for wordnet_id, _, name in (line.partition(" ") for line in text.splitlines())]

"""Converts one model from its source to a folder, array by array, in the memory of one array."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from poolformer_jax.errors import InputError
from poolformer_jax.images import PoolFormerImageProcessor
from poolformer_jax.weights import (
    TRANSFORMS,
    WEIGHTS,
    Leaf,
    ModelFiles,
    OpenedModel,
    WeightsFile,
    identify_model,
    leaves,
    write_model,
)


@dataclass(frozen=True)
class ArrayMapping:
    """One array of the source and what it becomes."""

    given_name: str  # its name in the source's file
    source: Leaf  # its parameter in the source's layout
    target: Leaf  # its parameter in the destination's layout
    dtype: str  # its type in the source's file

    @property
    def transform(self) -> str:
        """How its dimensions are rearranged, such as "OIHW -> HWIO", or "as it is"."""
        if self.source.transform == self.target.transform:
            return "as it is"
        # "same" is our layout, or an array that no layout rearranges.
        known = {leaf.transform for leaf in (self.source, self.target)} - {"same"}
        tree = TRANSFORMS[next(iter(known))].description.split(" <-> ")[1]
        there, here = (
            tree if leaf.transform == "same" else TRANSFORMS[leaf.transform].description.split(" <-> ")[0]
            for leaf in (self.source, self.target)
        )
        return f"{there} -> {here}"


def identify_source(files: ModelFiles, weights: WeightsFile, variant: str | None = None) -> OpenedModel:
    """Matches opened weights with their network, which must be a classifier.

    Raises the errors of `open_model`, and InputError for a backbone.
    """
    source = identify_model(files, weights, variant)
    if not source.plan.has_classifier:
        raise InputError(
            f"{files.weights} is a backbone without final norm and head. Expected a classifier; give it a head first: "
            "load_pretrained(..., num_labels=N, reset_head=True), then save_pretrained."
        )
    return source


def saved_image_processor(source: OpenedModel) -> PoolFormerImageProcessor | None:
    """The preprocessing saved with the source; None without one, or for other channels than it can have."""
    return source.saved_image_processor if source.config.num_channels in (1, 3) else None


def check_destination(destination: Path, weights: WeightsFile, *, overwrite: bool) -> None:
    """Raises InputError if the folder is the source's, or has a model and `overwrite` is False."""
    if destination.resolve() in {path.parent.resolve() for path in weights.files}:
        raise InputError(f"{destination} is the source's own folder. Expected another one; the source is not changed.")
    existing = [name for name in WEIGHTS if (destination / name).exists()]
    if existing and not overwrite:
        raise InputError(
            f"{destination} already has a model ({existing[0]}). Expected a new folder, or --overwrite to replace it."
        )


def convert(
    source: OpenedModel, destination: Path, layout: str, on_progress: Callable[[int], None], report: str
) -> list[ArrayMapping]:
    """Writes the model of `source` into the folder `destination`, whole or not at all.

    `on_progress` is called with the number of bytes of every array after it has been read. A file named `report`, which
    describes an old model in `destination`, is removed with that model.

    Returns:
        The mapping of every array, in the order of the destination.

    Raises:
        InputError: if the layout's model cannot compute this network.
    """
    mappings = map_arrays(source, layout)

    def arrays() -> Iterator[np.ndarray]:
        for mapping in mappings:
            tensor = source.weights.tensors[mapping.given_name]
            ours = TRANSFORMS[mapping.source.transform].to_tree(np.asarray(tensor).astype(np.float32, copy=False))
            yield TRANSFORMS[mapping.target.transform].to_layout(ours)
            on_progress(tensor.nbytes)

    processor = saved_image_processor(source)
    if processor is None and source.config.num_channels == 3:
        processor = source.default_image_processor
    write_model(destination, source.config, layout, arrays(), processor, described_by=[report])
    return mappings


def map_arrays(source: OpenedModel, layout: str) -> list[ArrayMapping]:
    """Pairs every array of the source with its place in a layout."""
    by_path = {leaf.path: leaf for leaf in source.plan.leaves}
    mappings = []
    for target in leaves(source.config, layout):
        leaf = by_path[target.path]
        name = source.plan.given_name(leaf)
        mappings.append(ArrayMapping(name, leaf, target, source.weights.tensors[name].dtype.name))
    return mappings

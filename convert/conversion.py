"""One model from its source to a folder, array by array: the memory of one array, whatever the model's size."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from poolformer_jax import PoolFormerConfig, PoolFormerImageProcessor
from poolformer_jax.errors import InputError
from poolformer_jax.hub import NotInCache
from poolformer_jax.weights.containers.files import WeightsFile, open_weights
from poolformer_jax.weights.folder import write_model
from poolformer_jax.weights.names import TRANSFORMS, Leaf, leaves
from poolformer_jax.weights.source import ModelFiles, find_model_files, network_of
from poolformer_jax.weights.transfer import ImportPlan, plan_import


@dataclass(frozen=True)
class Source:
    """A model that was opened, and matched with the network it is of; none of its numbers was read.

    Args:
        given: what the caller named: a folder, a file, or a name on the Hub.
        files: where its files are.
        weights: names, types and shapes of its arrays.
        plan: which of them is which parameter.
        processor: its preprocessing; None if it has none written down.
    """

    given: str
    files: ModelFiles
    weights: WeightsFile
    plan: ImportPlan
    processor: PoolFormerImageProcessor | None

    @property
    def config(self) -> PoolFormerConfig:
        """The network."""
        return self.plan.detection.config

    @property
    def layout(self) -> str:
        """Whose names the arrays have."""
        return self.plan.detection.layout


@dataclass(frozen=True)
class Mapped:
    """One array's way: its leaf in the source's layout and in the destination's."""

    given_name: str
    source: Leaf
    target: Leaf
    dtype: str

    @property
    def transform(self) -> str:
        """How its dimensions are laid out on either side, "OIHW -> HWIO"; "as it is" if alike."""
        kinds = {self.source.transform, self.target.transform}
        if len(kinds) == 1:
            return "as it is"
        (kind,) = kinds - {"same"}  # one side is ours
        there, here = TRANSFORMS[kind].description.split(" <-> ")
        return f"{there} -> {here}" if self.source.transform == kind else f"{here} -> {there}"


def open_source(given: str, *, use_ema: bool = False, variant: str | None = None, **hub: Any) -> Source:
    """Finds a model and matches it with its network.

    Args:
        given: a folder, a weights file, or a name on the Hub.
        use_ema: whether to take the moving average of the weights.
        variant: the published network, where the arrays do not tell it (metaformer_id_s12).
        hub: revision, cache_dir, local_files_only and token, as in `load_pretrained`.

    Raises:
        ValueError, FileNotFoundError: as `load_pretrained`.
    """
    files = find_model_files(given, **hub)
    weights = open_weights(files.weights, use_ema=use_ema)
    config = network_of(files, weights)
    if variant is not None:
        kept = {"num_labels": config.num_labels, "id2label": config.id2label, "head_order": config.head_order}
        config = PoolFormerConfig.from_variant(variant, **kept)
    plan = plan_import(weights.tensors, config)
    if not plan.detection.classifier:
        raise InputError(
            f"{files.weights} holds a backbone without final norm and head, and a model folder holds a classifier. "
            "Give it a head first: load_pretrained(..., num_labels=N, reset_head=True), then save_pretrained."
        )
    # Our preprocessing makes one channel or three, and of what feeds other networks nothing can be carried over.
    processor = _processor(files, given, hub) if config.num_channels in (1, 3) else None
    return Source(given, files, weights, plan, processor)


def _processor(files: ModelFiles, given: str, hub: dict[str, Any]) -> PoolFormerImageProcessor | None:
    try:
        return PoolFormerImageProcessor.from_pretrained(given if not Path(given).exists() else files.weights, **hub)
    except NotInCache:
        raise
    except FileNotFoundError:
        return None


def convert(source: Source, destination: Path, layout: str, advance: Callable[[int], None]) -> list[Mapped]:
    """Writes the model of `source` into the folder `destination`, whole or not at all.

    Args:
        source: the model.
        destination: the folder.
        layout: a key of `names.LAYOUTS`.
        advance: called with the bytes of every array that has been read.

    Returns:
        The way of every array, in the order of the destination.

    Raises:
        ValueError: if the layout's model cannot compute this network, or the folder is the source's own.
    """
    if destination.resolve() in {path.parent.resolve() for path in source.weights.files}:
        raise InputError(
            f"{destination} is the folder of the source itself. Expected another one, to leave it as it is."
        )
    mapped = pair(source, layout)

    def arrays() -> Iterator[np.ndarray]:
        for one in mapped:
            tensor = source.weights.tensors[one.given_name]
            here = TRANSFORMS[one.source.transform].here(np.asarray(tensor).astype(np.float32, copy=False))
            yield TRANSFORMS[one.target.transform].there(here)
            advance(tensor.nbytes)

    write_model(destination, source.config, layout, arrays(), source.processor)
    return mapped


def pair(source: Source, layout: str) -> list[Mapped]:
    """Source and destination of every array."""
    by_path = {leaf.path: leaf for leaf in source.plan.leaves}
    pairs = []
    for target in leaves(source.config, layout):
        leaf = by_path[target.path]
        name = source.plan.given_name(leaf)
        pairs.append(Mapped(name, leaf, target, source.weights.tensors[name].dtype.name))
    return pairs

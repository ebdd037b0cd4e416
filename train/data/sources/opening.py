"""Opens the data set that a config names. A new kind of source gets a branch here."""

from pathlib import Path
from typing import TYPE_CHECKING

from train.data.config import DataConfig
from train.data.sources.class_map import labels_by_map, read_class_map
from train.data.sources.folders import FolderSource, open_folder
from train.data.sources.memory import open_digits, open_synthetic
from train.data.sources.source import ArraySource, Source, SourceError, check_not_empty

if TYPE_CHECKING:
    from train.data.sources.tfds import TfdsSource


def open_source(config: DataConfig, split: str) -> Source:
    """The split named `split` of the data set that `config.source` names.

    Raises:
        SourceError: if there is no such data set or split, nothing in it, or a class that the class map lacks.
    """
    source = _open(config, split)
    remedy = "Choose another with --data.train-split or --data.evaluation-split (in evaluate: --split), or add images"
    check_not_empty(source, config.source, split, remedy)
    if config.class_map is None:
        return source
    names = read_class_map(config.class_map)
    return source.relabel(names, labels_by_map(config.class_map, names, config.source, source.class_names))


def _open(config: DataConfig, split: str) -> "ArraySource | FolderSource | TfdsSource":
    kind, _, argument = config.source.partition(":")
    if argument == "PATH" and not Path(argument).exists():
        raise SourceError("No images were given. Expected --data.source folder:PATH, with the path of your images.")
    # Imported when needed, because TFDS takes seconds.
    if kind == "folder":
        return open_folder(argument, split, config.held_out)
    if kind == "tfds":
        from train.data.sources.tfds import open_tfds

        return open_tfds(argument, split, config.data_dir)
    if kind == "digits":
        return open_digits(split, config.held_out)
    return open_synthetic(split, config.synthetic_examples, config.image_size, config.num_channels)

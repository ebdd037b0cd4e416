"""Opens the data set that a config names. A new kind of source gets a branch here."""

from pathlib import Path
from typing import TYPE_CHECKING

from train.data.config import DataConfig
from train.data.sources.class_map import relabel_by_map
from train.data.sources.folders import FolderSource, open_folder
from train.data.sources.label_files import open_label_file
from train.data.sources.memory import open_digits, open_synthetic
from train.data.sources.parquet import ParquetSource, open_parquet
from train.data.sources.source import ArraySource, Source, SourceError, check_not_empty

if TYPE_CHECKING:
    from train.data.sources.tfds import TfdsSource


def open_source(config: DataConfig, split: str) -> Source:
    """The split named `split` of the data set that `config.source` names.

    Raises SourceError if there is no such data set or split, nothing in it, or a class that the class map lacks.
    """
    source = _open(config, split)
    remedy = "Choose another with --data.train-split or --data.evaluation-split (in evaluate: --split), or add images"
    check_not_empty(source, config.source, split, remedy)
    if config.class_map is None:
        return source
    return relabel_by_map(source, config.class_map, config.source)


def _open(config: DataConfig, split: str) -> "ArraySource | FolderSource | ParquetSource | TfdsSource":
    kind, _, argument = config.source.partition(":")
    if argument == "PATH" and not Path(argument).exists():
        raise SourceError("No images were given. Expected --data.source folder:PATH, with the path of your images.")
    # Imported when needed, because TFDS takes seconds.
    if kind == "folder":
        return open_folder(argument, split, config.held_out)
    if kind == "tfds":
        from train.data.sources.tfds import open_tfds

        return open_tfds(argument, split, config.data_dir)
    columns = (config.image_column, config.label_column, config.problem_type)
    if kind == "labels":
        return open_label_file(argument, split, config.held_out, *columns)
    if kind == "parquet":
        return open_parquet(argument, split, config.held_out, *columns)
    if kind == "digits":
        return open_digits(split, config.held_out)
    return open_synthetic(split, config.synthetic_examples, config.image_size, config.num_channels)

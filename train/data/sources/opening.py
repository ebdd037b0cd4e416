"""Opens the data set that a config names. A new kind of source gets a branch here."""

from pathlib import Path
from typing import TYPE_CHECKING

from train.data.config import DataConfig
from train.data.sources.class_map import relabel_by_map
from train.data.sources.folders import ALL_IMAGES, FolderSource, folder_splits, open_folder
from train.data.sources.label_files import label_file_splits, open_label_file
from train.data.sources.memory import open_digits, open_synthetic
from train.data.sources.parquet import ParquetSource, open_parquet, parquet_splits
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


def find_splits(config: DataConfig) -> tuple[str, ...] | None:
    """The splits that class folders, label files or Parquet are divided into, () if into none; None for other kinds.

    Raises SourceError if the data cannot be read.
    """
    kind, _, path = config.source.partition(":")
    if kind == "folder":
        return folder_splits(path)
    if kind == "labels":
        return label_file_splits(path, config.image_column, config.label_column, config.problem_type)
    return parquet_splits(path) if kind == "parquet" else None


def describe_split(config: DataConfig) -> str:
    """The evaluation split in words."""
    split, splits = config.evaluation_split, find_splits(config)
    whole = "all images" if config.has_target_vectors else "every class"
    share = f"{100 * config.held_out:g} % of {whole}"
    if split == ALL_IMAGES and splits == ():
        return "all images of its class folders" if config.source.startswith("folder:") else "all images"
    if splits is not None and split == "validation" and split not in splits:
        return f"split {split} ({share}, which training holds out)"
    if splits is not None and split == "train" and "validation" not in splits:
        return f"split {split} (without the {share} that training holds out)"
    return f"split {split}"


def describe_unused_test(config: DataConfig) -> str:
    """That the data has a split "test" which is not used, although validation is drawn from train; or ""."""
    splits = find_splits(config) or ()
    if config.evaluation_split != "validation" or "validation" in splits or "test" not in splits:
        return ""
    return "the split test is not used: evaluate --split test scores it"


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

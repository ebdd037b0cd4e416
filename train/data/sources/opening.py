"""Opens the data set that a config names. A new kind of source gets a branch here."""

from train.data.config import DataConfig
from train.data.sources.folders import open_folder
from train.data.sources.memory import open_digits, open_synthetic
from train.data.sources.source import Source, check_not_empty


def open_source(config: DataConfig, split: str) -> Source:
    """The split named `split` of the data set that `config.source` names.

    Raises:
        SourceError: if there is no such data set or split, or nothing in it.
    """
    kind, _, argument = config.source.partition(":")
    # Imported when needed, because TFDS takes seconds.
    if kind == "folder":
        source: Source = open_folder(argument, split, config.held_out)
    elif kind == "tfds":
        from train.data.sources.tfds import open_tfds

        source = open_tfds(argument, split, config.data_dir)
    elif kind == "digits":
        source = open_digits(split, config.held_out)
    else:
        source = open_synthetic(split, config.synthetic_examples, config.image_size, config.num_channels)
    remedy = "Choose another with --data.train-split or --data.evaluation-split (in evaluate: --split), or add images"
    check_not_empty(source, config.source, split, remedy)
    return source

"""A model, and the data that it is tried on, prepared as by the model's preprocessing."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from poolformer_jax import PoolFormerImageProcessor
from poolformer_jax.errors import InputError
from poolformer_jax.fields import check_rules, is_local
from poolformer_jax.hub import HubOptions
from poolformer_jax.weights import OpenedModel, open_model
from train.data import DataConfig, rules_of_columns
from train.folders import expand_home

OPEN_OPTIONS = ("variant", "ignore", "use_ema", *HubOptions.__annotations__)


@dataclasses.dataclass(frozen=True)
class ModelOnData:
    """The settings that `evaluate` and `probe` share."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """A model on the Hub (sail/poolformer_s12), a model folder (runs/digits/model), or a file of weights."""
    data: str
    """folder:PATH (class folders), labels:FILE, parquet:PATH, tfds:NAME or tfds:PATH, digits, or synthetic."""
    data_dir: Path | None = None
    """Where TFDS keeps its data sets. None: TFDS's own."""
    image_column: str | None = None
    """Column of the images in labels: and parquet: sources. None: as in training."""
    label_column: str = "label"
    """Column of the classes in them."""
    held_out: float | None = None
    """Share of every class that makes a missing validation split. None: training's, digits 0.2 and others 0.1."""
    class_map: Path | None = None
    """File with the label of each class of the data: a class per line, in order, or JSON {name: label}."""
    use_ema: bool = False
    """Take the running mean of the weights, where a checkpoint of PyTorch has one."""
    variant: str | None = None
    """The published network, if the arrays do not determine it: poolformer_ln_s12 looks like s12."""
    ignore: tuple[str, ...] = ()
    """Names of arrays in the weights file to leave out, as patterns: 'criterion.*'."""
    revision: str | None = None
    """Branch, tag or commit of a model on the Hub."""
    cache_dir: Path | None = None
    """The Hub's cache. None: huggingface_hub's, HF_HOME."""
    token: str | None = None
    """For private models. None: the one stored by hf auth login."""
    local_files_only: bool = False
    """Use the cache without asking the Hub."""
    batch_size: int = 256
    """Images in a step."""
    output: Path | None = None
    """Folder for the results."""

    def __post_init__(self) -> None:
        expand_home(self, "output", "cache_dir")
        rules = [
            (
                "data_dir",
                self.data.startswith("tfds:") or self.data_dir is None,
                "None: only tfds:NAME is looked for there",
            ),
            *rules_of_columns(self.data, self.image_column, self.label_column),
            ("batch_size", self.batch_size >= 1, "a positive number of images"),
            ("output", is_local(self.output), "a folder of this machine, or of a bucket that is mounted"),
        ]
        check_rules(self, rules)

    def open_model(self) -> OpenedModel:
        """The model, without its weights."""
        return open_model(self.source, **{name: getattr(self, name) for name in OPEN_OPTIONS})

    def data_config(self, processor: PoolFormerImageProcessor, source: str | None = None, **fields: Any) -> DataConfig:
        """The data, with the size and normalisation of the model's preprocessing.

        Args:
            processor: the preprocessing.
            source: as `DataConfig.source`; None for `data`.
            fields: further fields of the config.

        Raises:
            InputError: if the preprocessing makes images of different sizes.
        """
        if processor.output_size is None:
            raise InputError(
                f"The preprocessing of {self.source} makes images of different sizes, which cannot be in one batch. "
                "Expected do_center_crop=True, or a size of height and width without crop_pct."
            )
        mean, std = processor.normalization.unit_mean_and_std()
        source = source or self.data
        return DataConfig(
            source=source,
            held_out=(0.2 if source == "digits" else 0.1) if self.held_out is None else self.held_out,
            data_dir=self.data_dir,
            image_column=self.image_column,
            label_column=self.label_column,
            class_map=self.class_map,
            image_size=max(processor.output_size),
            image_mean=tuple(mean),
            image_std=tuple(std),
            **fields,
        )

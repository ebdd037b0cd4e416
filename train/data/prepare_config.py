"""The settings of `python -m train prepare`."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Annotated, Literal

import tyro

from poolformer_jax.fields import check_rules, is_local
from train.data.config import rules_of_columns

VERSION = "1.0.0"
_SOURCES = ("folder", "labels", "parquet", "imagenet")


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What to pack, and where."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """folder:PATH (class folders), labels:FILE, parquet:PATH, or imagenet:PATH (the archives of ILSVRC2012)."""
    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUTPUT")]
    """Folder for data sets; the result is in NAME/1.0.0 below it."""
    name: str | None = None
    """Name of the data set. None: the folder's, or ilsvrc2012."""
    held_out: float = 0.1
    """Share of every class for validation if the source has no validation split."""
    image_column: str | None = None
    """Column of the images. None: file_name in labels: sources, image in parquet: sources."""
    label_column: str = "label"
    """Column of the classes in labels: and parquet: sources."""
    class_map: Path | None = None
    """File with the class names in the order of their labels: one per line, or JSON {name: label}. None: sorted."""
    images_per_shard: int = 1024
    """Images in a file. A thousand photographs of ImageNet make 120 MB."""
    threads: int = 8
    """Shards written at the same time."""
    on_bad_image: Literal["error", "skip"] = "error"
    """For files that cannot be read as images: list them and stop, or leave them out and list them."""

    def __post_init__(self) -> None:
        kind, _, path = self.source.partition(":")
        rules = [
            ("source", kind in _SOURCES and path, "folder:PATH, labels:FILE, parquet:PATH or imagenet:PATH"),
            *rules_of_columns(self.source, self.image_column, self.label_column),
            ("output", is_local(self.output), "a local folder, or one of a mounted bucket"),
            ("name", re.fullmatch(r"[a-z]\w*", self.dataset_name), "a lower-case letter, then letters, digits and _"),
            ("held_out", 0 < self.held_out < 1, "a share between 0 and 1"),
            ("images_per_shard", self.images_per_shard > 0, "a positive number of images"),
            ("threads", self.threads > 0, "a positive number"),
        ]
        check_rules(self, rules)

    @property
    def path(self) -> Path:
        """The path in `source`."""
        return Path(self.source.partition(":")[2]).expanduser()

    @property
    def dataset_name(self) -> str:
        """The name in TFDS."""
        if self.name is not None:
            return self.name
        if self.source.startswith("imagenet:"):
            return "ilsvrc2012"  # TFDS already has an imagenet2012
        name = self.path.stem if self.path.is_file() else Path(os.path.realpath(self.path)).name
        cleaned = re.sub(r"\W+", "_", name.lower()).strip("_")
        return cleaned if cleaned[:1].isalpha() else f"images_{cleaned}"

    @property
    def folder(self) -> Path:
        """Where the finished data set is."""
        return self.output.expanduser() / self.dataset_name / VERSION

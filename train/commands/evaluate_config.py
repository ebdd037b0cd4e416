"""The settings of `python -m train evaluate`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from poolformer_jax.fields import check_rules, is_local
from train.config import DistributedConfig
from train.folders import expand_home


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """A model and the split to evaluate it on."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """A model on the Hub (sail/poolformer_s12), a model folder (runs/digits/model), a file of weights, or an exported
    file (s12.onnx, s12.xml, s12.stablehlo)."""
    data: str
    """folder:PATH (class folders), labels:FILE, parquet:PATH, tfds:NAME or tfds:PATH, digits, synthetic, or
    imagenet-c:PATH (every corruption and severity of ImageNet-C)."""
    split: str | None = None
    """The split; TFDS's slices work for tfds: "validation[:5000]". Default: validation, or all of undivided data."""
    data_dir: Path | None = None
    """Where TFDS keeps its data sets. Default: TFDS's own."""
    image_column: str | None = None
    """Column of the images in labels: and parquet: sources. Default: as in training."""
    label_column: str = "label"
    """Column of the classes in them."""
    held_out: float | None = None
    """Share of every class that makes a missing --split validation. Default: training's, digits 0.2 and others 0.1."""
    class_map: Path | None = None
    """File with the model's label of each class of the data: a class per line, in order, or JSON {name: label}."""
    use_ema: bool = False
    """Evaluate the running mean of the weights, where a checkpoint of PyTorch has one."""
    variant: str | None = None
    """The published network, if the arrays do not determine it: poolformer_ln_s12 looks like s12."""
    ignore: tuple[str, ...] = ()
    """Names of arrays in the weights file to leave out, as patterns: 'criterion.*'."""
    revision: str | None = None
    """Branch, tag or commit of a model on the Hub."""
    cache_dir: Path | None = None
    """The Hub's cache. Default: huggingface_hub's, HF_HOME."""
    token: str | None = None
    """For private models. Default: the one stored by hf auth login."""
    local_files_only: bool = False
    """Use the cache without asking the Hub."""
    batch_size: int = 256
    """Images in a step, over all processes; rounded up to a multiple of the devices."""
    workers: int | None = None
    """Worker processes on every host that decode images. Default: one for every core but one."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Stop at an image that cannot be read and name it, or leave it out of the score and say so."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the activations."""
    flip: bool = False
    """Average the logits of every image and of its mirror image."""
    preprocessing: Literal["transformers", "timm"] = "transformers"
    """timm: as its validate.py, which ignores EXIF orientation and rounds the place of the crop to even. Otherwise the
    pixels are those of inference, and of transformers."""
    classes: Literal["all", "data"] = "all"
    """Choose among all classes of the model, or only those of the data, as is usual for ImageNet-A and ImageNet-R."""
    real_labels: Path | None = None
    """real.json with the ReaL labels of ImageNet's validation images: score by them too."""
    results_file: Path | None = None
    """CSV file to add a row to, with the columns of timm's validate.py; by ReaL labels if they are given."""
    output: Path | None = None
    """Folder for report.html, evaluation.json, predictions.csv, and the pictures that report.html shows."""
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    """How the processes of several hosts find each other."""

    def __post_init__(self) -> None:
        expand_home(self, "output", "results_file", "cache_dir")
        rules = [
            (
                "results_file",
                self.results_file is None or not self.data.startswith("imagenet-c:"),
                "None with imagenet-c: its figure has no column there; see --output",
            ),
            ("batch_size", self.batch_size >= 1, "a positive number of images"),
            ("output", is_local(self.output), "a folder of this machine, or of a bucket that is mounted"),
        ]
        check_rules(self, rules)

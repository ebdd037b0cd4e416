"""The settings of `python -m train evaluate`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from poolformer_jax.export import FORMATS
from poolformer_jax.fields import check_rules
from poolformer_jax.hub import ACCESS_OPTIONS
from train.commands.model_data import OPEN_OPTIONS, ModelOnData
from train.config import DistributedConfig
from train.folders import expand_home


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(ModelOnData):
    """A model and the split to evaluate it on."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """A model on the Hub, a model folder, a file of weights, or an exported file (s12.onnx, s12.xml, s12.stablehlo)."""
    data: str
    """folder:, labels:, parquet:, tfds:, digits or synthetic, as in training; or imagenet-c:PATH, all of ImageNet-C."""
    split: str | None = None
    """The split, such as tfds's "validation[:5000]". None: validation, or all of undivided data."""
    batch_size: int = 256
    """Images in a step, over all processes; rounded up to a multiple of the devices."""
    workers: int | None = None
    """Worker processes on every host that decode images. None: one for every core but one."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Stop at an image that cannot be read and name it, or leave it out of the score and say so."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the activations."""
    flip: bool = False
    """Average the logits of every image and of its mirror image."""
    preprocessing: Literal["transformers", "timm"] = "transformers"
    """transformers: the pixels of inference. timm: those of its validate.py, with its crop and without EXIF's turns."""
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
        super().__post_init__()
        expand_home(self, "results_file")
        corrupted, why = self.data.startswith("imagenet-c:"), "None with imagenet-c"
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        rules = [
            ("results_file", not corrupted or self.results_file is None, f"{why}: its figure has no column there"),
            ("real_labels", not corrupted or self.real_labels is None, f"{why}: they are of the validation images"),
            *(
                (
                    name,
                    not self.is_exported or getattr(self, name) == defaults[name],
                    "the default for exported files",
                )
                for name in (*OPEN_OPTIONS, "dtype")
                if name not in ACCESS_OPTIONS
            ),
        ]
        check_rules(self, rules)

    @property
    def is_exported(self) -> bool:
        """True if the source is an exported file, which computes as it was exported."""
        return Path(self.source).suffix.lower() in FORMATS

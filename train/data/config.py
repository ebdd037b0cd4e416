"""The data set of a run and the changes to its images, as frozen dataclasses that are checked when created.

Defaults are those of the paper's ImageNet training (arXiv 2111.11418, section 4.1; train.py and README of
sail-sg/poolformer). `DIGITS` is a small data set that needs no download.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from PIL import Image

from poolformer_jax.fields import BELOW_1, NOT_NEGATIVE, PROBABILITY, between, check_rules, in_range, is_local, or_none
from poolformer_jax.images import LARGEST_SIDE, PoolFormerImageProcessor
from poolformer_jax.network import ProblemType
from train.data.augment.random_augment import RandAugment

_LOCAL = "a local path; mount a bucket on every host (gcsfuse, for example) and give the folder where it is mounted"
FILE_SOURCES = ("folder", "labels", "parquet", "tfds")  # each with a path after a colon
_UNIT_RANGE = ", for pixels in 0..1; divide statistics of pixels in 0..255 by 255"
_MOST_IMAGES, _MOST_WORKERS = 1 << 20, 1_024


def rules_of_columns(source: str, image_column: str | None, label_column: str) -> list[tuple[str, object, str]]:
    """The rules for `check_rules` of a command: only two kinds of sources have columns.

    Not for `DataConfig`, because a recipe keeps its columns when a flag changes its source.
    """
    has_columns = source.startswith(("labels:", "parquet:"))
    why = "with other sources than labels: and parquet:, which have no columns"
    return [
        ("image_column", has_columns or image_column is None, f"None {why}"),
        ("label_column", has_columns or label_column == "label", f"the default {why}"),
    ]


@dataclasses.dataclass(frozen=True)
class HostAugmentation:
    """Random changes to single images, in the worker processes."""

    crop: Literal["random_resized", "evaluation"] = "random_resized"
    """A random crop that is resized, or the resize and crop of evaluation."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop, as a share of the image's."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the random crop."""
    interpolation: Literal["random", "bilinear", "bicubic"] = "random"
    """Filter that resizes the crop; "random" chooses one of the two for every image."""
    resizer: Literal["auto", "pillow", "simd"] = "auto"
    """Library that resizes it: Pillow or cykooz-resizer (simd: faster, rounds differently); auto: simd if installed."""
    scaled_decoding: bool = True
    """Decode JPEGs at 1/4 or 1/8 if the crop shrinks at least as much: faster, pixels differ a little."""
    horizontal_flip: float = 0.5
    """Probability of mirroring left and right."""
    vertical_flip: float = 0.0
    """Probability of mirroring top and bottom, for images without a fixed "up"."""
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Strengths of random brightness, contrast, saturation and hue, as in torchvision (timm: 0.4 0.4 0.4 0)."""
    randaugment: str = "rand-m9-mstd0.5-inc1"
    """RandAugment in timm's notation (m magnitude, mstd its noise, n operations, p probability, inc1), or "none"."""
    max_shift: float = 0.0
    """Largest random shift along each axis, as a share of the image's edge; the rest is black."""
    max_rotation: float = 0.0
    """Largest random rotation in degrees, either way; the corners are black."""

    def __post_init__(self) -> None:
        rules = [
            ("crop_scale", 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1, "0 < smallest <= largest <= 1"),
            ("crop_ratio", 0 < self.crop_ratio[0] <= self.crop_ratio[1], "0 < smallest <= largest"),
            *in_range(self, PROBABILITY, "horizontal_flip", "vertical_flip"),
            ("color_jitter", min(self.color_jitter) >= 0, "0 or positive numbers"),
            ("color_jitter", self.color_jitter[3] <= 0.5, "at most 0.5 for hue, half the colour circle"),
            *in_range(self, BELOW_1, "max_shift"),
            ("max_rotation", 0 <= self.max_rotation <= 180, "degrees from 0 to 180"),
        ]
        check_rules(self, rules)
        if self.randaugment != "none":
            RandAugment.from_notation(self.randaugment)  # raises if it is invalid

    @property
    def is_random(self) -> bool:
        """True if training changes images in another way than evaluation."""
        strengths = (self.horizontal_flip, self.vertical_flip, *self.color_jitter, self.max_shift, self.max_rotation)
        return self.crop != "evaluation" or self.randaugment != "none" or any(strengths)


@dataclasses.dataclass(frozen=True)
class DeviceAugmentation:
    """Random changes to whole batches, on the device inside the training step."""

    # The authors drew one mixing ratio for the 128 images of each GPU. Every image has the same distribution for any
    # group size.

    mixup: float = 0.8
    """Alpha of mixup's Beta(alpha, alpha); 0 switches mixup off."""
    cutmix: float = 1.0
    """Alpha of cutmix's Beta(alpha, alpha); 0 switches cutmix off."""
    mix_probability: float = 1.0
    """Probability that a group of images is mixed at all."""
    switch_to_cutmix: float = 0.5
    """Probability of cutmix rather than mixup if both are on."""
    mix_group: int = 32
    """Consecutive images that share a mixing ratio; divides the batch size. 0: the whole batch."""
    label_smoothing: float = 0.1
    """Share of the target that is spread evenly over all classes."""
    erase_probability: float = 0.25
    """Probability of replacing a random rectangle of an image with noise."""
    erase_area: tuple[float, float] = (0.02, 1 / 3)
    """Area of that rectangle, as a share of the image's."""
    erase_ratio: tuple[float, float] = (0.3, 1 / 0.3)
    """Height over width of that rectangle."""

    def __post_init__(self) -> None:
        rules = [
            *in_range(self, NOT_NEGATIVE, "mixup", "cutmix"),
            *in_range(self, PROBABILITY, "mix_probability", "switch_to_cutmix", "erase_probability"),
            *in_range(self, BELOW_1, "label_smoothing"),
            ("mix_group", self.mix_group >= 0 and self.mix_group % 2 == 0, "0 or an even number of images"),
            ("erase_area", 0 < self.erase_area[0] <= self.erase_area[1] < 1, "0 < smallest <= largest < 1"),
            ("erase_ratio", 0 < self.erase_ratio[0] <= self.erase_ratio[1], "0 < smallest <= largest"),
        ]
        check_rules(self, rules)

    @property
    def mixes(self) -> bool:
        """True if images are ever mixed."""
        return (self.mixup > 0 or self.cutmix > 0) and self.mix_probability > 0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data set, how it is read, and how its images are changed."""

    source: str = "digits"
    """digits, synthetic, folder:PATH (a folder per class), labels:FILE, parquet:PATH, tfds:NAME or tfds:PATH."""
    data_dir: Path | None = None
    """Folder of TFDS's data sets, for "tfds:NAME". None: TFDS's."""
    class_map: Path | None = None
    """File with the class names in the order of their labels: one per line, or JSON {name: label}. None: sorted."""
    image_column: str | None = None
    """Column of the images. None: file_name in labels: sources, image in parquet: sources."""
    label_column: str = "label"
    """Column of the classes in labels: and parquet: sources. Several targets: their columns, separated by commas."""
    problem_type: ProblemType = "single_label_classification"
    """One class per image; any number of classes per image; or numbers. The last two need labels: or parquet:."""
    train_split: str = "train"
    """Split to train on; slices such as "train[:90%]" work for tfds sources."""
    evaluation_split: str = "validation"
    """Split to evaluate on."""
    held_out: float = 0.1
    """Share of every class held out for evaluation if a source has no split for it; chosen by the images' names."""
    image_size: int = 224
    """Height and width of the network's input in pixels."""
    crop_pct: float | None = PoolFormerImageProcessor.crop_pct
    """Evaluation's crop as a share of the resized image's edge: 0.9 for s*, 0.95 for m*; None resizes directly."""
    evaluation_interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Filter that resizes for evaluation; saved with the model."""
    image_mean: tuple[float, ...] = tuple(PoolFormerImageProcessor.image_mean)
    """Mean per channel of pixels in 0..1: one value for greyscale images, three for RGB."""
    image_std: tuple[float, ...] = tuple(PoolFormerImageProcessor.image_std)
    """Standard deviation per channel of pixels in 0..1."""
    batch_size: int = 1024
    """Images in a training step, over all processes."""
    evaluation_batch_size: int | None = None
    """Images in an evaluation step, over all processes. None: batch_size."""
    sampling: Literal["uniform", "balanced"] = "uniform"
    """uniform: every image once an epoch. balanced: every class equally often, images of small classes repeatedly."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: weigh the training loss so that every class counts the same, however many images it has."""
    seed: int = 42
    """Seed of the order of the images and of every random change made on the host."""
    workers: int | None = None
    """Worker processes per process of the run; 0: a thread instead. None: the number of cores minus one."""
    worker_batches: int = 2
    """Batches that every worker prefetches."""
    on_bad_image: Literal["error", "skip"] = "error"
    """An unreadable image stops the run, or is reported and replaced (in evaluation: left out)."""
    synthetic_examples: int = 1024
    """Number of images in every split of the "synthetic" source."""
    augment: HostAugmentation = HostAugmentation()
    """Random changes to single images, in the workers."""
    mix: DeviceAugmentation = DeviceAugmentation()
    """Random changes to batches, on the device."""

    def __post_init__(self) -> None:
        kind, _, argument = self.source.partition(":")
        known = (kind in FILE_SOURCES and argument) or self.source in ("digits", "synthetic")
        rules = [
            ("source", known, "digits, synthetic, folder:PATH, labels:FILE, parquet:PATH, tfds:NAME or tfds:PATH"),
            ("source", is_local(argument) and not argument.startswith("//"), _LOCAL),  # "//": of https://...
            ("data_dir", is_local(self.data_dir), _LOCAL),
            ("class_map", is_local(self.class_map), "the path of a local file"),
            ("held_out", 0 < self.held_out < 1, "a share between 0 and 1"),
            # A recipe is a small file: what it asks for is bounded before any work is done.
            *in_range(self, between(1, LARGEST_SIDE), "image_size"),
            *in_range(self, between(1, _MOST_IMAGES), "batch_size", "synthetic_examples"),
            *in_range(self, or_none(between(1, _MOST_IMAGES)), "evaluation_batch_size"),
            *in_range(self, between(1, _MOST_WORKERS), "worker_batches"),
            *in_range(self, or_none(between(0, _MOST_WORKERS)), "workers"),
            ("image_mean", len(self.image_mean) in (1, 3), "1 or 3 values"),
            ("image_mean", all(0 <= mean <= 1 for mean in self.image_mean), f"values from 0 to 1{_UNIT_RANGE}"),
            ("image_std", len(self.image_std) == len(self.image_mean), "the same number of values as image_mean"),
            ("image_std", all(0 < std <= 1 for std in self.image_std), f"values above 0 and up to 1{_UNIT_RANGE}"),
            (
                "sampling",
                self.sampling == "uniform" or self.class_weights == "none",
                "uniform with class_weights='balanced': together they would count small classes twice",
            ),
            *self._rules_of_targets(),
            ("seed", 0 <= self.seed < 2**63, "a whole number from 0 to 2**63 - 1"),
        ]
        check_rules(self, rules)

    def _rules_of_targets(self) -> list[tuple[str, object, str]]:
        """What multi-label classification and regression do not define."""
        if not self.has_target_vectors:
            return []
        tables = self.source.startswith(("labels:", "parquet:"))
        numbers = self.problem_type == "regression"
        why = f" with problem_type={self.problem_type!r}"
        return [
            ("source", tables, f"labels:FILE or parquet:PATH{why}: other sources have one class per image"),
            ("class_map", self.class_map is None, f"None{why}"),
            ("sampling", self.sampling == "uniform", f"uniform{why}: an image has no single class"),
            ("class_weights", self.class_weights == "none", f"none{why}: an image has no single class"),
            (
                "mix",
                not numbers or self.mix.label_smoothing == 0,
                f"--data.mix.label-smoothing 0{why}",
            ),
            (
                "mix",
                not numbers or self.mix.cutmix == 0,
                f"--data.mix.cutmix 0{why}; mixup mixes the numbers",
            ),
        ]

    @property
    def evaluation_size(self) -> int:
        """Images of an evaluation's batch."""
        return self.evaluation_batch_size or self.batch_size

    @property
    def augments(self) -> bool:
        """True if training changes images at random."""
        return self.augment.is_random or self.mix.mixes or self.mix.erase_probability > 0

    @property
    def has_target_vectors(self) -> bool:
        """True if an image has a vector of targets, not the index of a class."""
        return self.problem_type != "single_label_classification"

    @property
    def num_channels(self) -> int:
        """Channels of the network's input: 3 (RGB) or 1 (greyscale)."""
        return len(self.image_mean)

    def image_processor(self) -> PoolFormerImageProcessor:
        """The preprocessing for evaluation, saved with the trained model."""
        return PoolFormerImageProcessor(
            size={"shortest_edge": self.image_size},
            crop_pct=self.crop_pct,
            resample=Image.Resampling[self.evaluation_interpolation.upper()].value,
            crop_size={"height": self.image_size, "width": self.image_size},
            image_mean=self.image_mean,
            image_std=self.image_std,
        )


DIGITS = DataConfig(
    source="digits",
    held_out=0.2,
    image_size=32,
    crop_pct=None,
    image_mean=(0.5,),
    image_std=(0.5,),
    batch_size=128,
    augment=HostAugmentation(
        crop="evaluation", horizontal_flip=0.0, randaugment="none", max_shift=0.1, max_rotation=10.0
    ),
    mix=DeviceAugmentation(mixup=0.0, cutmix=0.0, label_smoothing=0.1, erase_probability=0.0),
)
"""8 x 8 scans resized to 32 x 32, shifted and rotated a little, never mirrored."""

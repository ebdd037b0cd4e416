"""Recipes: everything a run depends on, as one typed value, and the values that are known to work.

A recipe is what `python -m train NAME` runs; every field is a flag. The ImageNet recipes are the authors' training
(sail-sg/poolformer: the defaults of train.py, and the README's drop-path rates), written out.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from poolformer_jax import PoolFormerImageProcessor
from poolformer_jax.fields import check_rules, is_local, is_none_or_positive
from poolformer_jax.network.variants import RESULTS
from train.compute.distributed import DistributedConfig
from train.compute.network_config import ComputeType, FreshNetwork, PretrainedNetwork
from train.compute.optimizer import OptimizerConfig
from train.compute.sharding import MeshConfig
from train.data.config import DIGITS, DataConfig, DeviceAugmentation, HostAugmentation
from train.home import expand_home


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on."""

    run_dir: Path
    """Folder of the run. If it holds an unfinished run of the same recipe, that run goes on."""
    model: FreshNetwork | PretrainedNetwork
    """The network. Its labels and channels follow from the data."""
    data: DataConfig
    """Images, and how they are changed."""
    optimizer: OptimizerConfig
    """How the weights move."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """How the devices share the work."""
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    """How the processes of several hosts find each other."""
    dtype: ComputeType = "float32"
    """Type of the activations: bfloat16 is fast on TPUs and GPUs, float64 checks numerics with JAX_ENABLE_X64=1."""
    remat: bool = False
    """Keep only the stages' inputs and compute the rest again for the gradient: less memory, a third more time."""
    kernels: bool = True
    """On TPUs v5e and v6e and on NVIDIA GPUs in bfloat16: compute blocks with Pallas kernels, not all by XLA."""
    seed: int = 42
    """Seed of the first weights and of everything random on the device. The order of the images has data.seed."""
    log_every: int = 50
    """Steps between two lines of metrics."""
    evaluate_every: int = 1
    """Epochs between two evaluations. The last step is evaluated in any case."""
    save_every: int | None = None
    """Steps between two checkpoints. One is written before each evaluation, too. Default: one epoch."""
    checkpoint_dir: str | None = None
    """Folder of the checkpoints, which all hosts share, or a bucket's (gs://...). Default: checkpoints in run_dir."""
    keep_checkpoints: int = 3
    """Number of checkpoints to keep."""
    keep_every: int | None = None
    """Steps between two checkpoints that are kept for good, besides the newest ones. Default: none is."""
    max_skipped: int = 20
    """Stop after this many steps in a row without a finite gradient; each of them leaves the weights alone."""
    max_steps: int | None = None
    """End the run after this step, in the middle of its schedule. For trying out."""
    profile_steps: int = 0
    """Steps to trace with jax.profiler, after ten that warm up, into the folder profile in run_dir."""
    example_images: int = 5
    """Images of the evaluation split to write into the run's folder, for trying the trained model."""

    def __post_init__(self) -> None:
        expand_home(self, "run_dir", "checkpoint_dir")
        states = self.checkpoint_dir or ""
        rules = [
            (
                "run_dir",
                is_local(self.run_dir),
                "a folder of this machine, or of a bucket that is mounted; states alone go into a bucket with "
                "--checkpoint-dir gs://... beside a local --run-dir",
            ),
            (
                "checkpoint_dir",
                is_local(states) or states.startswith(("gs://", "s3://")),
                "a folder that all hosts share, or gs://... or s3://...",
            ),
            ("seed", 0 <= self.seed < 2**32, "a whole number from 0 to 2**32 - 1"),
            ("log_every", self.log_every >= 1, "at least 1"),
            ("evaluate_every", self.evaluate_every >= 1, "at least 1"),
            ("save_every", is_none_or_positive(self.save_every), "at least 1, or None"),
            ("keep_checkpoints", self.keep_checkpoints >= 1, "at least 1"),
            ("keep_every", is_none_or_positive(self.keep_every), "at least 1, or None"),
            ("max_skipped", self.max_skipped >= 1, "at least 1"),
            ("max_steps", is_none_or_positive(self.max_steps), "at least 1, or None"),
            ("profile_steps", self.profile_steps >= 0, "0 or more"),
            ("example_images", self.example_images >= 0, "0 or more"),
        ]
        check_rules(self, rules)

    @property
    def checkpoints(self) -> str:
        """Where the checkpoints are."""
        return self.checkpoint_dir or str(self.run_dir / "checkpoints")

    def steps_per_epoch(self, examples: int) -> int:
        """Whole batches in `examples` images, at least 1."""
        return max(examples // self.data.batch_size, 1)

    def total_steps(self, examples: int) -> int:
        """The step after which the run is done."""
        steps = self.optimizer.total_epochs * self.steps_per_epoch(examples)
        return min(steps, self.max_steps or steps)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values, as the run's folder keeps it."""
        data = as_json(dataclasses.asdict(self))
        data["model"]["kind"] = type(self.model).__name__
        return data


def as_json(values: dict[str, Any]) -> dict[str, Any]:
    """The same values as JSON gives them back."""
    return json.loads(json.dumps(values, default=lambda value: dict(value) if hasattr(value, "items") else str(value)))


# What may change between the parts of one run, with everything inside of it: none of it changes what is learnt. Sums
# may be rounded in another order, and with another optimizer.accumulate drop path tosses its coins anew.
FREE_TO_CHANGE = (
    "run_dir",
    "mesh",
    "distributed",
    "log_every",
    "evaluate_every",
    "save_every",
    "checkpoint_dir",
    "keep_checkpoints",
    "keep_every",
    "max_skipped",
    "max_steps",
    "profile_steps",
    "example_images",
    "optimizer.accumulate",
    "remat",
    "kernels",
    "data.source",  # wherever it lies: `identity` asks for the same examples
    "data.data_dir",
    "data.workers",
    "data.worker_batches",
    "data.on_bad_image",
    "data.evaluation_split",
    "data.evaluation_batch_size",
    "data.augment.resizer",  # "auto" or by name: `identity` asks for the same one
)


# What each host may have its own of.
FREE_TO_DIFFER = (
    "run_dir",
    "distributed",
    "checkpoint_dir",
    "data.source",
    "data.data_dir",
    "data.workers",
    "data.worker_batches",
    "data.augment.resizer",
)


def differences(before: dict[str, Any], now: dict[str, Any], free: tuple[str, ...] = FREE_TO_CHANGE) -> list[str]:
    """Fields, as "name: before -> now", in which two `to_dict()`s would not continue each other."""
    left, right = _flat(before), _flat(now)
    return [
        f"{name}: {left.get(name)!r} -> {right.get(name)!r}"
        for name in {**left, **right}
        if left.get(name) != right.get(name) and not any(name == one or name.startswith(f"{one}.") for one in free)
    ]


def in_present_fields(noted: dict[str, Any], config: TrainConfig) -> tuple[dict[str, Any], list[str]]:
    """A `to_dict()` that another version of this program noted, in the fields of `config`, to be compared with it.

    Returns:
        values: by full name ("data.seed"); a field that was not there then has its default, as if nobody had set it.
        unknown: as "name: value", fields that there are no more. What became of them is not known.
    """
    values, fields = _flat(as_json(_defaults(config))) | _flat(noted), _flat(config.to_dict())
    known = {name: value for name, value in values.items() if name in fields}
    return known, [f"{name}: {value!r}" for name, value in values.items() if name not in fields]


def _defaults(config: Any) -> dict[str, Any]:
    """What fields, and those inside of them, hold where nobody sets them; without those that have to be set."""
    defaults: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            defaults[field.name] = _defaults(value)
        elif field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
    return defaults


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by full name, as flags have it: "data.seed"."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A run that is known to work: what it is for, and its value."""

    summary: str
    details: str
    config: TrainConfig


def _imagenet(variant: str, drop_path_rate: float) -> Recipe:
    """The authors' ImageNet-1k training of one size."""
    (top_1, gmacs), crop_pct = RESULTS[variant], PoolFormerImageProcessor.for_variant(variant).crop_pct
    # Forward and backward are three forward passes, of two operations a multiply-add: an estimate, not a measurement.
    images = 310 * 1_281_167
    hours = images * gmacs * 1e9 * 6 / (0.25 * 16 * 275e12) / 3600
    return Recipe(
        summary=f"PoolFormer-{variant.upper()} on ImageNet-1k, as the authors train it",
        details=f"""
        PoolFormer-{variant.upper()} on ImageNet-1k as the authors train it: 300 epochs and 10 of cool-down, AdamW at
        1e-3 per 1024 images, RandAugment, mixup, cutmix, random erasing, drop path {drop_path_rate}.

        Command:  python -m train imagenet-{variant} --data.source tfds:imagenet2012

        Expected: {top_1} % top-1 at 224 pixels, the authors' own result (README of sail-sg/poolformer); this program
        has not been run to the end on ImageNet. About {hours:.1f} hours on a TPU v4-32 if its 16 chips reach a quarter
        of their peak and the hosts keep up: an estimate from the number of operations, not a measurement.
        """,
        config=TrainConfig(
            run_dir=Path(f"runs/imagenet-{variant}"),
            model=FreshNetwork.from_variant(variant, drop_path_rate=drop_path_rate),
            # One mixing ratio for the 128 images of each of the authors' 8 GPUs.
            data=DataConfig(source="tfds:imagenet2012", crop_pct=crop_pct, mix=DeviceAugmentation(mix_group=128)),
            optimizer=OptimizerConfig(),
            # As near as TPUs come to the float16 that the authors mix in (--apex-amp), and in need of no loss scale.
            dtype="bfloat16",
        ),
    )


_SMALL = FreshNetwork(
    depths=(2, 2),
    hidden_sizes=(32, 64),
    patch_sizes=(7, 3),
    strides=(4, 2),
    padding=(2, 1),
    token_mixers=("pooling",) * 2,
    position_embeddings=(False,) * 2,
    layer_scale_init_value=1e-1,
)

DIGITS_RECIPE = Recipe(
    summary="a small PoolFormer on scikit-learn's digits, in a minute",
    details="""
    A small PoolFormer on scikit-learn's 1,797 scans of handwritten digits, which come with the package. The scans are
    8 x 8 pixels, enlarged to 32 x 32; a fifth of them is held out.

    Command:  python -m train
    """,
    config=TrainConfig(
        run_dir=Path("runs/digits"),
        model=_SMALL,
        data=dataclasses.replace(DIGITS, batch_size=64),
        optimizer=OptimizerConfig(
            learning_rate=3e-3,
            learning_rate_batch=None,
            epochs=40,
            warmup_epochs=3,
            cooldown_epochs=0,
            schedule_every="step",
        ),
        log_every=11,
        evaluate_every=5,
        save_every=220,
    ),
)

_FINETUNE = Recipe(
    summary="published or trained weights, fine-tuned to your own images",
    details="""
    Published or trained weights with a new head, fine-tuned to the classes of your own images: a small learning rate
    that falls further with the distance from the head, few epochs, gentle augmentation.

    Command:  python -m train finetune --model.source sail/poolformer_s12 --data.source folder:PATH

    Take a larger --data.image-size for small details: the network takes any. See docs/fine-tuning.md.
    """,
    config=TrainConfig(
        run_dir=Path("runs/finetune"),
        model=PretrainedNetwork(),
        data=DataConfig(
            source="folder:PATH",
            batch_size=128,
            augment=HostAugmentation(crop_scale=(0.35, 1.0), interpolation="bicubic", scaled_decoding=False),
            mix=DeviceAugmentation(mixup=0.0, cutmix=0.0, erase_probability=0.1),
        ),
        optimizer=OptimizerConfig(
            learning_rate=5e-4,
            learning_rate_batch=128,
            epochs=20,
            warmup_epochs=1,
            cooldown_epochs=0,
            schedule_every="step",
            layer_decay=0.85,
            clip_norm=1.0,
        ),
        log_every=10,
    ),
)

_SMOKE = Recipe(
    summary="a few steps that show whether everything works on this machine",
    details="""
    A few steps of a small network on made-up images, through everything that a long run needs: all devices and
    processes, augmentation, evaluation, checkpoints, the final folder. The result means nothing.

    Command:  python -m train smoke
    """,
    config=TrainConfig(
        run_dir=Path("runs/smoke"),
        model=dataclasses.replace(_SMALL, drop_path_rate=0.1),
        data=DataConfig(
            source="synthetic", image_size=32, batch_size=64, synthetic_examples=256, crop_pct=None, workers=0
        ),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, learning_rate_batch=None, epochs=4, warmup_epochs=1, cooldown_epochs=1, ema_decay=0.9
        ),
        log_every=2,
        save_every=4,
        example_images=2,
    ),
)

RECIPES: dict[str, Recipe] = {
    "digits": DIGITS_RECIPE,
    "imagenet-s12": _imagenet("s12", drop_path_rate=0.1),
    "imagenet-s24": _imagenet("s24", drop_path_rate=0.1),
    "imagenet-s36": _imagenet("s36", drop_path_rate=0.2),
    "imagenet-m36": _imagenet("m36", drop_path_rate=0.3),
    "imagenet-m48": _imagenet("m48", drop_path_rate=0.4),
    "finetune": _FINETUNE,
    "smoke": _SMOKE,
}

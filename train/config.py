"""Everything a run depends on, as typed, frozen values that are checked when they are made.

Every field is a flag of `python -m train RECIPE`. What a run reads and how it changes the images is in
`train.data.config`. Does not import jax.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import tyro

from poolformer_jax import PoolFormerConfig
from poolformer_jax.errors import InputError
from poolformer_jax.fields import AT_LEAST_1, BELOW_1, NOT_NEGATIVE, POSITIVE, check_rules, in_range, is_local, or_none
from poolformer_jax.files import read_json
from poolformer_jax.network import ProblemType
from train.data import DataConfig
from train.folders import expand_home, is_utf8
from train.json_values import as_json, from_json

ComputeType = Literal["float32", "bfloat16", "float64"]
BestMetric = Literal["top1", "loss", "balanced-accuracy", "f1", "map", "mae", "r2"]
# What an evaluation measures, by the kind of targets.
BEST_METRICS: Mapping[ProblemType, tuple[BestMetric, ...]] = {
    "single_label_classification": ("top1", "loss", "balanced-accuracy", "f1"),
    "multi_label_classification": ("map", "f1", "loss"),
    "regression": ("loss", "mae", "r2"),
}
Tracker = Literal["wandb", "trackio"]
OptimizerName = Literal["adamw", "lamb", "lion", "sgd"]
# The values of each optimizer for fields that are None.
_FOLDERS = ("run_dir", "checkpoint_dir")
_OPTIMIZER_DEFAULTS: Mapping[OptimizerName, Mapping[str, float]] = {
    "adamw": {"beta2": 0.999, "epsilon": 1e-8},
    "lamb": {"beta2": 0.999, "epsilon": 1e-6, "clip_norm": 1.0},  # timm's
    "lion": {"beta2": 0.99},
    "sgd": {},
}


@dataclasses.dataclass(frozen=True)
class FreshNetwork(PoolFormerConfig):
    """A network with new weights. Labels, their names and channels follow from the data, so they are not flags."""

    num_channels: tyro.conf.Suppress[int] = 3
    num_labels: tyro.conf.Suppress[int] = 0
    id2label: tyro.conf.Suppress[Mapping[int, str] | None] = None


@dataclasses.dataclass(frozen=True)
class PretrainedNetwork:
    """Pretrained weights, with a new head for the classes of the data."""

    source: str = "sail/poolformer_s12"
    """A model on the Hub (sail/poolformer_s12), a model folder, or a weights file."""
    use_ema: bool = False
    """Use the running mean of the weights, if the file has one."""
    variant: str | None = None
    """The published network, if the arrays do not determine it: poolformer_ln_s12 looks like s12."""
    ignore: tuple[str, ...] = ()
    """Names of arrays in the weights file to leave out, as patterns: 'criterion.*'."""
    keep_head: bool = False
    """Keep the head too. Its classes must be those of the data, in the same order."""
    drop_path_rate: float = 0.1
    """Drop-path probability of the last block; it grows linearly from 0 over all blocks."""
    dropout_rate: float = 0.0
    """Dropout after both layers of the MLP."""
    head_dropout_rate: float = 0.0
    """Dropout before the last layer of the head."""

    def __post_init__(self) -> None:
        rates = in_range(self, BELOW_1, "drop_path_rate", "dropout_rate", "head_dropout_rate")
        check_rules(self, [("source", bool(self.source), "the name of a model, or a path"), *rates])


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and the schedule of its learning rate."""

    name: OptimizerName = "adamw"
    """adamw; lamb as in timm; lion; or sgd with Nesterov momentum."""
    learning_rate: float = 1e-3
    """Learning rate after the warm-up, for a batch of learning_rate_batch images."""
    learning_rate_batch: int | None = 1024
    """The learning rate is scaled by batch_size / learning_rate_batch. None: it is not scaled."""
    epochs: int = 300
    """Epochs of the schedule, warm-up included."""
    warmup_epochs: int = 5
    """Epochs in which the learning rate rises linearly from warmup_learning_rate."""
    cooldown_epochs: int = 10
    """Epochs after those, at the last learning rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up a cosine down to final_learning_rate, or the same learning rate to the end."""
    warmup_learning_rate: float = 1e-6
    """Learning rate of the first step."""
    final_learning_rate: float = 1e-5
    """The lowest learning rate, at the end of the cosine."""
    schedule_every: Literal["epoch", "step"] = "epoch"
    """Change the learning rate between epochs, as the authors do, or with every step."""
    weight_decay: float = 0.05
    """Decay of parameters with two or more dimensions; sgd adds it to the gradient, as torch does."""
    beta1: float = 0.9
    """Decay of the running mean of the gradient; sgd's momentum."""
    beta2: float | None = None
    """Decay of the mean of the squared gradient (None: 0.999); of lion that of the gradient (None: 0.99)."""
    epsilon: float | None = None
    """adamw, lamb: added to the square root of that mean. None: 1e-8 for adamw, 1e-6 for lamb."""
    clip_norm: float | None = None
    """Clip the gradient to this global norm; inf: no clipping. None: 1 for lamb, no clipping for the others."""
    layer_decay: float | None = None
    """Multiply the learning rate by this for every block further from the head, for fine-tuning. None: off."""
    freeze: tuple[str, ...] = ()
    """What is not learnt: backbone (all but the head), stem, stages_0, ..., norm, or patterns of names: "*/norm*"."""
    accumulate: int = 1
    """Compute the gradient in this many parts of the batch, for less memory; changes drop path's random numbers."""
    ema_decay: float | None = None
    """Keep a running mean of the weights with this decay (timm: 0.9998), and evaluate it too. None: off."""
    ema_warmup: bool = False
    """Begin with a smaller decay, at most 1 - (step + 1)^(-2/3), so that the mean forgets the initial weights."""

    def __post_init__(self) -> None:
        rules = [
            ("learning_rate", 0 < self.learning_rate < math.inf, "a positive, finite number"),
            *in_range(self, or_none(POSITIVE), "learning_rate_batch", "epsilon", "clip_norm"),
            *in_range(self, AT_LEAST_1, "epochs", "accumulate"),
            *in_range(self, NOT_NEGATIVE, "cooldown_epochs", "warmup_learning_rate", "final_learning_rate"),
            *in_range(self, NOT_NEGATIVE, "weight_decay"),
            *in_range(self, BELOW_1, "beta1"),
            *in_range(self, or_none(BELOW_1), "beta2", "ema_decay"),
            (
                "warmup_epochs",
                0 <= self.warmup_epochs < self.epochs,
                f"0 or more, and fewer than epochs={self.epochs} (--optimizer.warmup-epochs)",
            ),
            ("layer_decay", self.layer_decay is None or 0 < self.layer_decay <= 1, "None, or a number in (0, 1]"),
            ("ema_warmup", not self.ema_warmup or self.ema_decay is not None, "ema_decay too (--optimizer.ema-decay)"),
        ]
        check_rules(self, rules)

    def with_defaults(self) -> "OptimizerConfig":
        """The same values, with the optimizer's defaults for those that are None."""
        defaults = _OPTIMIZER_DEFAULTS[self.name].items()
        missing: dict[str, Any] = {name: value for name, value in defaults if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)

    def without_defaults(self) -> "OptimizerConfig":
        """The same values, with None for those that are the optimizer's defaults."""
        defaults = _OPTIMIZER_DEFAULTS[self.name].items()
        unset: dict[str, Any] = {name: None for name, value in defaults if getattr(self, name) == value}
        return dataclasses.replace(self, **unset)

    @property
    def total_epochs(self) -> int:
        """Length of the run: the cool-down follows `epochs`, as in timm (300 + 10 = 310)."""
        return self.epochs + self.cooldown_epochs


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The mesh of the devices of all processes."""

    data: int = -1
    """Groups of devices that each hold all weights; -1: the number of devices divided by fsdp."""
    fsdp: int = 1
    """Devices that share one copy of weights and optimizer state. Raise it if one device cannot hold them."""
    fsdp_min_size: int = 2**14
    """Arrays with fewer elements are replicated on every device."""

    def __post_init__(self) -> None:
        rules = [
            ("data", self.data == -1 or self.data >= 1, "a positive number of groups, or -1 for all devices"),
            *in_range(self, AT_LEAST_1, "fsdp"),
            *in_range(self, NOT_NEGATIVE, "fsdp_min_size"),
        ]
        check_rules(self, rules)


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run on several hosts find each other."""

    mode: Literal["auto", "off"] = "auto"
    """auto: join the processes of a TPU pod, Slurm, GKE or Open MPI, and run alone elsewhere; off: run alone."""
    coordinator_address: str | None = None
    """host:port of process 0, if the environment does not name it."""
    num_processes: int | None = None
    """Number of processes, one per host; with coordinator_address."""
    process_id: int | None = None
    """Index of this process, from 0; with coordinator_address."""
    timeout: int = 300
    """Seconds to wait for the other processes at the start, and until all see the same checkpoints."""

    def __post_init__(self) -> None:
        explicit = (self.coordinator_address, self.num_processes, self.process_id)
        complete = None not in explicit or explicit == (None, None, None)
        host, _, port = (self.coordinator_address or "host:1").rpartition(":")
        count, index = self.num_processes or 1, self.process_id or 0
        rules = [
            ("coordinator_address", complete, "all of coordinator_address, num_processes and process_id, or none"),
            ("coordinator_address", host and port.isdecimal() and 0 < int(port) < 2**16, "host:port of process 0"),
            *in_range(self, AT_LEAST_1, "timeout"),
            *in_range(self, or_none(AT_LEAST_1), "num_processes"),
            ("process_id", 0 <= index < count, f"a number from 0 to {count - 1}, because num_processes={count}"),
        ]
        check_rules(self, rules)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on."""

    run_dir: Path
    """Folder of the run. If it holds an unfinished run of the same recipe, that run is resumed."""
    model: FreshNetwork | PretrainedNetwork
    """The network; its labels and channels follow from the data."""
    data: DataConfig
    """The images, and their augmentation."""
    optimizer: OptimizerConfig
    """The optimizer."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """The mesh of devices."""
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    """How several hosts join one run."""
    dtype: ComputeType = "float32"
    """Type of the activations: bfloat16 is fast on TPUs and GPUs; float64 (with JAX_ENABLE_X64=1) checks numerics."""
    remat: bool = False
    """Recompute each stage in the backward pass: less memory, a third more time."""
    kernels: Literal["auto", "on", "off"] = "auto"
    """Pallas kernels, in bfloat16 on TPUs v5e, v6e and NVIDIA GPUs. auto compares each with XLA first, on does not."""
    seed: int = 42
    """Seed of the initial weights and of all random numbers on the device; data.seed is that of the images' order."""
    log_every: int = 50
    """Steps per line of metrics."""
    evaluate_every: int = 1
    """Epochs between evaluations. The last step is always evaluated."""
    keep_best: BestMetric | None = None
    """Write the weights with the best held-out value of this metric as the model. None: write the last ones. top1 and
    balanced-accuracy need one class per image, map several, mae and r2 numbers."""
    patience: int | None = None
    """End the run after this many evaluations in a row without a better keep_best. None: train to the end."""
    save_every: int | None = None
    """Steps between checkpoints. One is also written before each evaluation. None: one epoch."""
    checkpoint_dir: str | None = None
    """Folder of the checkpoints, shared by all hosts, or a bucket (gs://...). None: checkpoints in run_dir."""
    keep_checkpoints: int = 3
    """Number of checkpoints to keep."""
    keep_every: int | None = None
    """Never delete checkpoints of multiples of this step. None: only the newest are kept."""
    max_skipped: int = 20
    """Stop after this many steps in a row without a finite gradient. Their updates are skipped."""
    max_steps: int | None = None
    """End the run after this step, in the middle of its schedule; for trials."""
    profile_steps: int = 0
    """Steps to trace with jax.profiler into run_dir/profile, after ten warm-up steps."""
    log_to: tuple[Tracker, ...] = ()
    """Experiment trackers that also get the metrics; install them with the extras wandb and trackio."""
    push_to_hub: str | None = None
    """At the end, upload the model to this repository of the Hugging Face Hub: OWNER/NAME."""
    example_images: int = 5
    """Images of the evaluation split to write into run_dir/examples, for trying the model."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "run_dir", Path(self.run_dir))  # from Python also a string
        expand_home(self, *_FOLDERS)
        states, metrics = self.checkpoint_dir or "", BEST_METRICS[self.data.problem_type]
        rules = [
            (
                "run_dir",
                is_local(self.run_dir),
                "a folder of this machine, or of a bucket that is mounted; only checkpoints can go into a bucket, with "
                "--checkpoint-dir gs://... beside a local --run-dir",
            ),
            (
                "checkpoint_dir",
                is_local(states) or states.startswith(("gs://", "s3://")),
                "a folder that all hosts share, or gs://... or s3://...",
            ),
            *((name, is_utf8(getattr(self, name)), "a path in UTF-8, as Orbax needs") for name in _FOLDERS),
            ("seed", 0 <= self.seed < 2**32, "a whole number from 0 to 2**32 - 1"),
            *in_range(self, AT_LEAST_1, "log_every", "evaluate_every", "keep_checkpoints", "max_skipped"),
            *in_range(self, or_none(AT_LEAST_1), "patience", "save_every", "keep_every", "max_steps"),
            *in_range(self, NOT_NEGATIVE, "profile_steps", "example_images"),
            (
                "keep_best",
                self.keep_best is None or self.keep_best in metrics,
                f"one of {', '.join(metrics)} with data.problem_type={self.data.problem_type!r}",
            ),
            ("patience", not self.patience or self.keep_best, "None without keep_best (--keep-best loss)"),
        ]
        check_rules(self, rules)

    @property
    def checkpoints(self) -> str:
        """The folder of the checkpoints."""
        return self.checkpoint_dir or str(self.run_dir / "checkpoints")

    def steps_per_epoch(self, examples: int) -> int:
        """Whole batches in `examples` images, at least 1."""
        return max(examples // self.data.batch_size, 1)

    def total_steps(self, examples: int) -> int:
        """The step after which the run ends."""
        steps = self.optimizer.total_epochs * self.steps_per_epoch(examples)
        return min(steps, self.max_steps or steps)

    def to_dict(self) -> dict[str, Any]:
        """All values, JSON-ready; recipe.json holds them."""
        data = as_json(dataclasses.asdict(dataclasses.replace(self, optimizer=self.optimizer.with_defaults())))
        data["model"]["kind"] = type(self.model).__name__
        return data

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """The config that `to_dict` wrote; a field that is missing has its default.

        Raises:
            InputError: naming the field, if a value is not one of its type, or there is no such field.
        """
        return from_json(cls, values, "")


def read_recipe_file(path: Path | str) -> TrainConfig:
    """The recipe in a file such as the recipe.json of a run.

    Raises:
        InputError: naming the file, if it holds no recipe of this version.
        OSError: if it cannot be read.
    """
    values = read_json(Path(path), "a recipe, such as recipe.json in the folder of a run")
    try:
        return TrainConfig.from_dict(values)
    except InputError as error:
        raise InputError(f"{path} is not a recipe of this version: {error}") from error

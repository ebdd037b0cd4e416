"""Everything a run depends on, as typed, frozen values that are checked when they are made.

Every field is a flag of `python -m train RECIPE`. What a run reads and how it changes the images is in
`train.data.config`. Does not import jax.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import tyro

from poolformer_jax import PoolFormerConfig
from poolformer_jax.fields import check_rules, is_local, is_none_or_positive
from train.data import DataConfig
from train.folders import expand_home

ComputeType = Literal["float32", "bfloat16", "float64"]


@dataclasses.dataclass(frozen=True)
class FreshNetwork(PoolFormerConfig):
    """A network with new weights. What follows from the data is no flag: labels, their names, and channels."""

    num_channels: tyro.conf.Suppress[int] = 3
    num_labels: tyro.conf.Suppress[int] = 0
    id2label: tyro.conf.Suppress[Mapping[int, str] | None] = None


@dataclasses.dataclass(frozen=True)
class PretrainedNetwork:
    """Weights to go on from, with a new head for the classes of the data."""

    source: str = "sail/poolformer_s12"
    """What load_pretrained opens: a model on the Hub (sail/poolformer_s12), a model folder, or a weights file."""
    use_ema: bool = False
    """Take the running mean of the weights, where the file has one."""
    keep_head: bool = False
    """Go on with the head as well. Its classes must be those of the data, in their order."""
    drop_path_rate: float = 0.1
    """Probability of dropping the last block's residual branches; it grows linearly from 0 over all blocks."""
    dropout_rate: float = 0.0
    """Dropout after both layers of the MLP."""

    def __post_init__(self) -> None:
        rules = [
            ("source", bool(self.source), "the name of a model, or a path"),
            ("drop_path_rate", 0 <= self.drop_path_rate < 1, "a probability in [0, 1)"),
            ("dropout_rate", 0 <= self.dropout_rate < 1, "a probability in [0, 1)"),
        ]
        check_rules(self, rules)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate over the run."""

    learning_rate: float = 1e-3
    """Learning rate after the warm-up, for a batch of learning_rate_batch images."""
    learning_rate_batch: int | None = 1024
    """The learning rate grows in proportion to the batch, from this one. None: learning_rate holds for any batch."""
    epochs: int = 300
    """Epochs from the start, warm-up included, until the learning rate is at its lowest."""
    warmup_epochs: int = 5
    """Epochs in which the learning rate grows linearly from warmup_learning_rate."""
    cooldown_epochs: int = 10
    """Further epochs, after those, at the lowest learning rate."""
    warmup_learning_rate: float = 1e-6
    """Learning rate of the first step."""
    final_learning_rate: float = 1e-5
    """The lowest learning rate, which the cosine ends at."""
    schedule_every: Literal["epoch", "step"] = "epoch"
    """When the learning rate changes: between epochs, as the authors' does, or with every step."""
    weight_decay: float = 0.05
    """Decoupled weight decay of parameters with two or more dimensions (kernels); none for biases, norms and scales."""
    beta1: float = 0.9
    """Decay of AdamW's running mean of the gradient."""
    beta2: float = 0.999
    """Decay of AdamW's running mean of the squared gradient."""
    epsilon: float = 1e-8
    """Added to the root of that mean."""
    clip_norm: float | None = None
    """Scale the gradient down to this global norm where it is larger. None: never."""
    layer_decay: float | None = None
    """Multiply the learning rate by this for every block further from the head, for fine-tuning. None: never."""
    accumulate: int = 1
    """Parts that a batch is cut into, for less memory: the same gradient, for which drop path and dropout draw anew."""
    ema_decay: float | None = None
    """Keep a running mean of the weights with this decay (0.9998 is timm's), and evaluate it too. None: none."""

    def __post_init__(self) -> None:
        rules = [
            ("learning_rate", self.learning_rate > 0, "a positive number"),
            ("learning_rate_batch", is_none_or_positive(self.learning_rate_batch), "a positive number, or None"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("warmup_epochs", 0 <= self.warmup_epochs < self.epochs, "0 or more, and fewer than epochs"),
            ("cooldown_epochs", self.cooldown_epochs >= 0, "0 or more"),
            ("warmup_learning_rate", self.warmup_learning_rate >= 0, "0 or a positive number"),
            ("final_learning_rate", self.final_learning_rate >= 0, "0 or a positive number"),
            ("weight_decay", self.weight_decay >= 0, "0 or a positive number"),
            ("beta1", 0 <= self.beta1 < 1, "a number in [0, 1)"),
            ("beta2", 0 <= self.beta2 < 1, "a number in [0, 1)"),
            ("epsilon", self.epsilon > 0, "a positive number"),
            ("clip_norm", is_none_or_positive(self.clip_norm), "a positive number, or None"),
            ("layer_decay", self.layer_decay is None or 0 < self.layer_decay <= 1, "a number in (0, 1], or None"),
            ("accumulate", self.accumulate >= 1, "at least 1"),
            ("ema_decay", self.ema_decay is None or 0 <= self.ema_decay < 1, "a number in [0, 1), or None"),
        ]
        check_rules(self, rules)

    @property
    def total_epochs(self) -> int:
        """Length of the run: the cool-down comes after `epochs`, as timm counts (300 and 10 make 310)."""
        return self.epochs + self.cooldown_epochs


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices of all processes are arranged."""

    data: int = -1
    """Groups of devices that each hold a whole copy of the weights; -1: as many as there are devices for."""
    fsdp: int = 1
    """Devices that share one copy of weights and optimizer state. Raise it when these do not fit into one device."""
    fsdp_min_size: int = 2**14
    """Arrays with fewer elements than this are kept whole on every device."""

    def __post_init__(self) -> None:
        rules = [
            ("data", self.data == -1 or self.data >= 1, "a positive number of groups, or -1 for all devices"),
            ("fsdp", self.fsdp >= 1, "a positive number of devices"),
            ("fsdp_min_size", self.fsdp_min_size >= 0, "0 or a positive number of elements"),
        ]
        check_rules(self, rules)


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run on several hosts find each other."""

    mode: Literal["auto", "off"] = "auto"
    """auto: find the processes of a TPU pod, Slurm, GKE or Open MPI, and run alone elsewhere; off: run alone."""
    coordinator_address: str | None = None
    """host:port of process 0, where the environment does not tell."""
    num_processes: int | None = None
    """Number of processes, one for every host; with coordinator_address."""
    process_id: int | None = None
    """Number of this process, from 0; with coordinator_address."""
    timeout: int = 300
    """Seconds to wait at the start for the other processes, and until all of them see the same checkpoints."""

    def __post_init__(self) -> None:
        explicit = (self.coordinator_address, self.num_processes, self.process_id)
        complete = None not in explicit or explicit == (None, None, None)
        host, _, port = (self.coordinator_address or "host:1").rpartition(":")
        count, index = self.num_processes or 1, self.process_id or 0
        rules = [
            ("coordinator_address", complete, "all of coordinator_address, num_processes and process_id, or none"),
            ("coordinator_address", host and port.isdecimal() and 0 < int(port) < 2**16, "host:port of process 0"),
            ("timeout", self.timeout >= 1, "at least 1"),
            ("num_processes", count >= 1, "a positive number"),
            ("process_id", 0 <= index < count, f"a number from 0 to {count - 1}, because num_processes={count}"),
        ]
        check_rules(self, rules)


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
    kernels: Literal["auto", "on", "off"] = "auto"
    """Pallas kernels for blocks in bfloat16 on TPUs v5e and v6e and NVIDIA GPUs; auto: if they agree with XLA there."""
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

"""How the weights move: AdamW, what decays, the learning rate of every step, and its decay over depth.

Sources: sail-sg/poolformer, train.py (the authors' defaults, on timm's optimizer and scheduler);
timm, scheduler/cosine_lr.py; AdamW: arXiv 1711.05101; layer-wise decay: arXiv 2106.08254, section 3.2.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from poolformer_jax.errors import InputError
from poolformer_jax.fields import check_rules, is_none_or_positive

Schedule = Callable[[jax.Array | int], jax.Array]


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


def make_schedule(config: OptimizerConfig, steps_per_epoch: int, batch_size: int) -> Schedule:
    """The learning rate of a step: timm's cosine schedule, cycle-free.

    With t the time in epochs (whole ones with `schedule_every="epoch"`), E epochs and W of warm-up:

        t < W:       warm-up + t * (peak - warm-up) / W
        W <= t < E:  final + (peak - final) * (1 + cos(pi * t / E)) / 2
        t >= E:      final

    The cosine's clock starts with the warm-up, not after it, so the peak itself is never quite reached: that is
    timm without `warmup_prefix`, and what the published weights were trained with.

    Raises:
        ValueError: if the peak of this batch size is below where the learning rate begins or ends.
    """
    peak = config.learning_rate * batch_size / (config.learning_rate_batch or batch_size)
    start, final = config.warmup_learning_rate, config.final_learning_rate
    # A cosine that rises to the end trains fastest where it should settle, and no loss would tell.
    names = ["final_learning_rate"] + ["warmup_learning_rate"] * (config.warmup_epochs > 0)
    if above := [f"optimizer.{name}={getattr(config, name):.3g}" for name in names if getattr(config, name) > peak]:
        raise InputError(
            f"{' and '.join(above)}: above the learning rate between them, {peak:.3g} for batches of {batch_size} "
            f"(optimizer.learning_rate={config.learning_rate:.3g} for {config.learning_rate_batch or 'any number of'} "
            "images). Expected at most as much, or a higher --optimizer.learning-rate."
        )

    def learning_rate(step: jax.Array | int) -> jax.Array:
        t = jnp.asarray(step) / steps_per_epoch
        if config.schedule_every == "epoch":
            t = jnp.asarray(step) // steps_per_epoch
        warm = start + t * (peak - start) / max(config.warmup_epochs, 1)
        cosine = final + (peak - final) * (1 + jnp.cos(jnp.pi * t / config.epochs)) / 2
        return jnp.where(t < config.warmup_epochs, warm, jnp.where(t < config.epochs, cosine, final))

    return learning_rate


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW without its learning rate: the training step multiplies by that of its own number.

    So a step that was skipped, because its gradient was not finite, does not shift the schedule of those after it.
    """
    parts = [
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    ]
    if config.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.layer_decay is not None:
        decay = config.layer_decay
        parts.append(optax.stateless(lambda updates, params: _scale_by_depth(updates, decay)))
    return optax.chain(*parts)


def decay_mask(params: Any) -> Any:
    """True for every parameter that decays: those with two or more dimensions."""
    return jax.tree.map(lambda parameter: parameter.ndim >= 2, params)


def layer_scales(params: Any, layer_decay: float) -> Any:
    """What each parameter's learning rate is multiplied by: `layer_decay` to the power of its distance from the head.

    The stem is layer 0. Every block is a layer; what precedes the first block of a stage belongs to that block's. The
    final norm and the head are the last layer, whose factor is 1.
    """
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(params)]
    blocks = sorted({found for name in names if (found := _block(name)) is not None})
    number = {block: index + 1 for index, block in enumerate(blocks)}
    last = len(blocks) + 1

    def scale(path: Any, _: Any) -> float:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        block = _block(name)
        layer = number[block] if block is not None else 0 if name.startswith("stem/") else last
        return float(layer_decay ** (last - layer))

    return jax.tree.map_with_path(scale, params)


def _block(name: str) -> tuple[int, int] | None:
    """(stage, block) of a parameter; what stands at the start of a stage counts with its first block."""
    if match := re.match(r"stages_(\d+)/(?:blocks_(\d+)/)?", name):
        return int(match[1]), int(match[2] or 0)
    return None


def _scale_by_depth(updates: Any, layer_decay: float) -> Any:
    return jax.tree.map(lambda update, scale: update * scale, updates, layer_scales(updates, layer_decay))

"""How the weights move: AdamW, what decays, the learning rate of every step, and its decay over depth.

Sources: sail-sg/poolformer, train.py (the authors' defaults, on timm's optimizer and scheduler);
timm, scheduler/cosine_lr.py; AdamW: arXiv 1711.05101; layer-wise decay: arXiv 2106.08254, section 3.2.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from poolformer_jax.errors import InputError
from train.config import OptimizerConfig

Schedule = Callable[[jax.Array | int], jax.Array]


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

"""The optimizers, the parameters that decay, the learning rate of every step, and its decay over depth.

Sources: sail-sg/poolformer, train.py (the authors' defaults, on timm's optimizer and scheduler);
timm, scheduler/cosine_lr.py and optim/lamb.py; AdamW: arXiv 1711.05101; LAMB: arXiv 1904.00962; Lion: arXiv 2302.06675;
layer-wise decay: arXiv 2106.08254, section 3.2.
"""

import fnmatch
import operator
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from poolformer_jax.errors import InputError
from poolformer_jax.messages import first_few
from train.config import OptimizerConfig

Schedule = Callable[[jax.Array | int], jax.Array]


def make_schedule(config: OptimizerConfig, steps_per_epoch: int, batch_size: int) -> Schedule:
    """The learning rate of a step: timm's cosine schedule, cycle-free, or a constant one.

    With t the time in epochs (whole ones with `schedule_every="epoch"`), E epochs and W of warm-up:

        t < W:       warm-up + t * (peak - warm-up) / W
        W <= t < E:  final + (peak - final) * (1 + cos(pi * t / E)) / 2
        t >= E:      final

    The cosine starts at step 0, not after the warm-up, so the peak is never quite reached. That is timm without
    `warmup_prefix`; the published weights were trained with it. With `schedule="constant"` it is the peak from W on.
    Raises ValueError if the peak for this batch size is below the first or the last learning rate, or if there are more
    steps than the state can count.
    """
    peak = config.learning_rate * batch_size / (config.learning_rate_batch or batch_size)
    if (steps := config.total_epochs * steps_per_epoch) >= 2**31:
        raise InputError(
            f"{config.total_epochs:,} epochs are {steps:,} steps. Expected fewer than {2**31:,}: choose fewer "
            "--optimizer.epochs, or --optimizer.cooldown-epochs."
        )
    start, final = config.warmup_learning_rate, config.final_learning_rate
    # Otherwise the cosine would rise to the end, which no loss curve would reveal.
    names = ["final_learning_rate"] * (config.schedule == "cosine")
    names += ["warmup_learning_rate"] * (config.warmup_epochs > 0)
    if above := [name for name in names if getattr(config, name) > peak]:
        values = " and ".join(f"optimizer.{name}={getattr(config, name):.3g}" for name in above)
        flags = " and ".join(f"--optimizer.{name.replace('_', '-')}" for name in above)
        raise InputError(
            f"{values}: above the peak, which is {peak:.3g} for batches of {batch_size} "
            f"(optimizer.learning_rate={config.learning_rate:.3g} for {config.learning_rate_batch or 'any number of'} "
            f"images). Expected {flags} of at most {peak:.3g}, or a higher --optimizer.learning-rate."
        )

    def learning_rate(step: jax.Array | int) -> jax.Array:
        t = jnp.asarray(step) / steps_per_epoch
        if config.schedule_every == "epoch":
            t = jnp.asarray(step) // steps_per_epoch
        warm = start + t * (peak - start) / max(config.warmup_epochs, 1)
        if config.schedule == "constant":
            return jnp.where(t < config.warmup_epochs, warm, peak)
        cosine = final + (peak - final) * (1 + jnp.cos(jnp.pi * t / config.epochs)) / 2
        return jnp.where(t < config.warmup_epochs, warm, jnp.where(t < config.epochs, cosine, final))

    return learning_rate


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optimizer without the learning rate: the training step multiplies the updates by it.

    So a skipped step, whose gradient is not finite, does not shift the schedule of later steps.
    """
    config = config.with_defaults()
    parts = _OPTIMIZERS[config.name](config)
    if config.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.freeze:  # frozen parameters have no state, and their gradients, which are zeros, pass through
        parts = [optax.masked(optax.chain(*parts), lambda params: jax.tree.map(operator.not_, frozen(params, config)))]
    if config.layer_decay is not None:
        decay = config.layer_decay
        parts.append(optax.stateless(lambda updates, params: _scale_by_depth(updates, decay)))
    return optax.chain(*parts)


def frozen(params: Any, config: OptimizerConfig) -> Any:
    """True for every parameter that `config.freeze` keeps as it is.

    Raises InputError if one of its patterns names no parameter, or they leave nothing to learn.
    """
    names = [_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    unused = [pattern for pattern in config.freeze if not any(_is_in(name, pattern) for name in names)]
    if unused or all(any(_is_in(name, pattern) for pattern in config.freeze) for name in names):
        problem = f"no parameter is named {first_few(unused)}" if unused else "nothing is left to learn"
        parts = dict.fromkeys(name.partition("/")[0] for name in names)
        raise InputError(
            f"optimizer.freeze={' '.join(config.freeze)}: {problem}. Expected parts of the network (backbone, "
            f"{', '.join(parts)}) or patterns of names such as {names[0]}, with * for any text; and something to learn."
        )
    return jax.tree.map_with_path(lambda path, _: any(_is_in(_name(path), one) for one in config.freeze), params)


def stop_gradients(params: Any, config: OptimizerConfig) -> Any:
    """The parameters, of which frozen ones have no gradient, so that the backward pass ends where all are frozen."""
    if not config.freeze:
        return params
    return jax.tree.map(lambda p, stops: lax.stop_gradient(p) if stops else p, params, frozen(params, config))


def _is_in(name: str, pattern: str) -> bool:
    if pattern == "backbone":
        return not name.startswith("head/")
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}/*")


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _adamw(config: OptimizerConfig) -> list[optax.GradientTransformation]:
    assert config.beta2 is not None and config.epsilon is not None
    return [optax.scale_by_adam(config.beta1, config.beta2, config.epsilon), _weight_decay(config)]


def _lamb(config: OptimizerConfig) -> list[optax.GradientTransformation]:
    """timm's LAMB: unlike optax.lamb, it scales only the updates of parameters that decay.

    make_optimizer clips the gradient first, as timm's LAMB does, too.
    """
    if not config.weight_decay:
        return _adamw(config)
    return [*_adamw(config), optax.masked(optax.scale_by_trust_ratio(), decay_mask)]


def _lion(config: OptimizerConfig) -> list[optax.GradientTransformation]:
    assert config.beta2 is not None
    return [optax.scale_by_lion(config.beta1, config.beta2), _weight_decay(config)]


def _sgd(config: OptimizerConfig) -> list[optax.GradientTransformation]:
    return [_weight_decay(config), optax.trace(config.beta1, nesterov=True)]


_OPTIMIZERS: dict[str, Callable[[OptimizerConfig], list[optax.GradientTransformation]]] = {
    "adamw": _adamw,
    "lamb": _lamb,
    "lion": _lion,
    "sgd": _sgd,
}


def _weight_decay(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.add_decayed_weights(config.weight_decay, mask=decay_mask)


def decay_mask(params: Any) -> Any:
    """True for every parameter with weight decay: those with two or more dimensions."""
    return jax.tree.map(lambda parameter: parameter.ndim >= 2, params)


def layer_scales(params: Any, layer_decay: float) -> Any:
    """The factor of each parameter's learning rate: `layer_decay` to the power of its distance from the head.

    The stem is layer 0 and every block is a layer; a stage's downsampling and position embedding belong to its first
    block. The final norm and the head are the last layer, with factor 1.
    """
    names = [_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    blocks = sorted({found for name in names if (found := _block(name)) is not None})
    number = {block: index + 1 for index, block in enumerate(blocks)}
    last = len(blocks) + 1

    def scale(path: Any, _: Any) -> float:
        name = _name(path)
        block = _block(name)
        layer = number[block] if block is not None else 0 if name.startswith("stem/") else last
        return float(layer_decay ** (last - layer))

    return jax.tree.map_with_path(scale, params)


def _block(name: str) -> tuple[int, int] | None:
    """(stage, block) of a parameter; None outside the stages."""
    if match := re.match(r"stages_(\d+)/(?:blocks_(\d+)/)?", name):
        return int(match[1]), int(match[2] or 0)
    return None


def _scale_by_depth(updates: Any, layer_decay: float) -> Any:
    return jax.tree.map(lambda update, scale: update * scale, updates, layer_scales(updates, layer_decay))

"""One training step: a pure function from a state and a batch to the next state and its metrics."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from train.compute.optimizer import Schedule, frozen, stop_gradients
from train.compute.sharding import BATCH_AXES
from train.compute.state import Classifier, TrainState
from train.config import OptimizerConfig

Batch = Mapping[str, Array]
Metrics = dict[str, Array]
# (key, images, labels) -> (pixel values, targets)
Augment = Callable[
    [PRNGKeyArray, UInt8[Array, "b h w c"], Int[Array, " b"] | Float[Array, "b labels"]],
    tuple[Float[Array, "b h2 w2 c"], Float[Array, "b labels"]],
]


def make_train_step(
    model: Classifier,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    augment: Augment,
    config: OptimizerConfig,
    seed: int,
    mesh: Mesh | None = None,
    shardings: Any = None,
    class_weights: Sequence[float] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step function, not compiled.

    All random numbers follow from (seed, state.step), so a resumed run repeats what an uninterrupted one does. A step
    whose loss or gradient is not finite is skipped and counted.

    `augment` changes a batch of images at random, and returns its targets. `mesh` is needed with `accumulate`, to
    spread every part over all devices. The cross entropy's terms are multiplied with `class_weights`, as in PyTorch.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        augment_key, dropout_key = jax.random.split(key)
        pixels, targets = augment(augment_key, batch["image"], batch["label"])
        (loss, accuracy), gradient = _accumulated(
            model, state.variables(), pixels, targets, dropout_key, config, mesh, class_weights
        )
        if shardings is not None:
            gradient = lax.with_sharding_constraint(gradient, shardings)
        learning_rate = schedule(state.step)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        def update(state: TrainState, gradient: Any) -> TrainState:
            updates, moments = optimizer.update(gradient, state.optimizer, state.params)
            params = jax.tree.map(lambda p, u: (p - learning_rate * u).astype(p.dtype), state.params, updates)
            ema = _running_mean(state.ema, params, config, state.step)
            return state.replace(params=params, ema=ema, optimizer=moments)

        # If the gradient is not finite, params, ema and optimizer stay as they were.
        # The best weights stay outside, where no branch copies them.
        state = _update_if(finite, update, state.replace(best=None), gradient).replace(
            best=state.best,
            step=state.step + 1,
            skipped=state.skipped + ~finite,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        metrics = {
            "loss": loss,
            "accuracy": accuracy,
            "learning_rate": learning_rate,
            "gradient_norm": norm,
            "skipped": state.skipped,
            "skipped_in_a_row": state.skipped_in_a_row,
        }
        return state, metrics

    return train_step


def _update_if(
    finite: Bool[Array, ""], update: Callable[[TrainState, Any], TrainState], state: TrainState, gradient: Any
) -> TrainState:
    """`update(state, gradient)` if `finite`, else `state`.

    On TPUs and GPUs `select` is fused into writing the new arrays. On CPUs XLA would copy all old arrays for it; a
    branch updates them in place.
    """

    def select(finite: Array, state: TrainState, gradient: Any) -> TrainState:
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), update(state, gradient), state)

    def branch(finite: Array, state: TrainState, gradient: Any) -> TrainState:
        return lax.cond(finite, update, lambda state, _: state, state, gradient)

    return lax.platform_dependent(finite, state, gradient, cpu=branch, default=select)


def _ema_decay(config: OptimizerConfig, step: Int[Array, ""]) -> Float[Array, ""] | float | None:
    """The decay of the running mean. With a warm-up it grows from 0, as in timm (`--model-ema-warmup`)."""
    if config.ema_decay is None or not config.ema_warmup:
        return config.ema_decay
    return jnp.minimum(config.ema_decay, 1 - (1.0 + step) ** (-2 / 3))


def _running_mean(mean: Any, params: Any, config: OptimizerConfig, step: Int[Array, ""]) -> Any:
    if (decay := _ema_decay(config, step)) is None:
        return mean

    def update(m: Array, p: Array, stays: bool = False) -> Array:
        return m if stays else (m * decay + p * (1 - decay)).astype(m.dtype)  # a frozen one would be rounded

    return jax.tree.map(update, mean, params, *([frozen(params, config)] if config.freeze else []))


def _accumulated(
    model: Classifier,
    variables: Mapping[str, Any],
    pixels: Float[Array, "b h w c"],
    targets: Float[Array, "b labels"],
    key: PRNGKeyArray,
    config: OptimizerConfig,
    mesh: Mesh | None,
    class_weights: Sequence[float] | None,
) -> tuple[tuple[Array, Array], Any]:
    """((loss, accuracy), gradient) of the batch, computed in `config.accumulate` sequential parts."""
    parts = config.accumulate

    def loss_and_accuracy(params: Any, pixels: Array, targets: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
        with_params = {**variables, "params": stop_gradients(params, config)}
        weighted = targets if class_weights is None else targets * jnp.asarray(class_weights, targets.dtype)
        output: Any = model.apply(with_params, pixels, labels=weighted, train=True, rngs={"dropout": key})
        return output.loss, _accuracy(model, output.logits, targets).astype(output.loss.dtype)

    value_and_grad, params = jax.value_and_grad(loss_and_accuracy, has_aux=True), variables["params"]
    if parts == 1:
        return value_and_grad(params, pixels, targets, key)

    def add_part(total: Any, part: tuple[Array, Array, Array]) -> tuple[Any, None]:
        number, pixels, targets = part
        result = value_and_grad(params, pixels, targets, jax.random.fold_in(key, number))
        return jax.tree.map(jnp.add, total, result), None

    shares = (jnp.arange(parts), _interleaved(pixels, parts, mesh), _interleaved(targets, parts, mesh))
    shapes = jax.eval_shape(value_and_grad, params, *(share[0] for share in shares[1:]), key)
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    total, _ = lax.scan(add_part, zeros, shares)
    return jax.tree.map(lambda value: value / parts, total)


def _accuracy(model: Classifier, logits: Float[Array, "b k"], targets: Float[Array, "b k"]) -> Float[Array, ""]:
    """The share of right answers: of images, or for several classes per image of their classes; NaN for regression."""
    match model.config.problem_type:
        case "regression":
            return jnp.full((), jnp.nan)
        case "multi_label_classification":
            return jnp.mean((logits > 0) == (targets > 0.5))
        case _:  # mixed images count as the class with the largest share
            return jnp.mean(jnp.argmax(logits, -1) == jnp.argmax(targets, -1))


def _interleaved(x: Float[Array, "b ..."], parts: int, mesh: Mesh | None) -> Float[Array, "parts b2 ..."]:
    """Splits the rows into parts, every `parts`-th row into the same one, so that no row moves between devices."""
    x = jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)
    if mesh is None:
        return x
    return lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, BATCH_AXES)))

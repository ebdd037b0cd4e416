"""The training state, and its initial value."""

from collections.abc import Callable
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from poolformer_jax import PoolFormerConfig


class Classifier(Protocol):
    """What steps and evaluations need of a linen network: `apply` gives an `ImageClassifierOutput`."""

    @property
    def config(self) -> PoolFormerConfig:
        """Its architecture."""

    @property
    def apply(self) -> Callable[..., Any]:
        """As of a linen module."""


class Best(flax.struct.PyTreeNode):
    """The best weights of a run so far, with --keep-best."""

    params: Any  # a copy of the weights
    # Their metric on the whole held-out split, higher is better; minus infinity before the first evaluation.
    score: Float[Array, ""]
    step: Int[Array, ""]  # the step after which they were evaluated
    evaluations_since: Int[Array, ""]  # number of evaluations since then


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes. It is donated to the next step, and checkpoints save it."""

    step: Int[Array, ""]  # number of steps done, skipped ones included; also the position in the data
    params: Any  # the network's parameters
    ema: Any  # their running mean, or None
    optimizer: optax.OptState  # the optimizer's state
    skipped: Int[Array, ""]  # number of steps that were skipped because their gradient was not finite
    skipped_in_a_row: Int[Array, ""]  # length of the current series of skipped steps
    # The network's arrays that are never trained (RandFormer's matrices), or None. Steps pass them on.
    constants: Any = None
    # With --keep-best, the best weights by kind ("params", "ema"). Evaluations change it, steps do not.
    best: dict[str, Best] | None = None

    def variables(self, weights: str = "params") -> dict[str, Any]:
        """What `model.apply` takes: the parameters, or with "ema" their running mean, and the constants."""
        constants = {} if self.constants is None else {"constants": self.constants}
        return {"params": getattr(self, weights), **constants}


def new_state(
    params: Any, optimizer: optax.GradientTransformation, ema: bool, constants: Any = None, best: bool = False
) -> TrainState:
    """The state before step 0."""
    # Copies, because the step donates the state, and a buffer can be donated only once.
    running_mean = jax.tree.map(jnp.copy, params) if ema else None
    kinds = {"params": params, "ema": running_mean} if ema else {"params": params}
    bests = {kind: _no_best(weights) for kind, weights in kinds.items()} if best else None
    # Three arrays, for the same reason.
    zeros = [jnp.zeros((), jnp.int32) for _ in range(3)]
    return TrainState(zeros[0], params, running_mean, optimizer.init(params), zeros[1], zeros[2], constants, bests)


def _no_best(params: Any) -> Best:
    return Best(
        jax.tree.map(jnp.copy, params),
        score=jnp.full((), -jnp.inf, jnp.float32),
        step=jnp.zeros((), jnp.int32),
        evaluations_since=jnp.zeros((), jnp.int32),
    )

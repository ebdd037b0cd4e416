"""What a step changes: one value, and how it begins."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int


class TrainState(flax.struct.PyTreeNode):
    """Everything a run is after a step; donated to the next one, and kept by checkpoints.

    Attributes:
        step: number of steps done, skipped ones included. It is also the position in the data.
        params: the network's parameters.
        ema: their running mean, or None if the run keeps none.
        optimizer: the optimizer's own state.
        skipped: number of steps whose gradient was not finite and whose update was left out.
        skipped_in_a_row: how many of them were the last ones.
    """

    step: Int[Array, ""]
    params: Any
    ema: Any
    optimizer: optax.OptState
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]


def new_state(params: Any, optimizer: optax.GradientTransformation, ema: bool) -> TrainState:
    """The state before the first step."""
    # A copy, because the step donates params and ema, and XLA cannot be given one buffer twice.
    running_mean = jax.tree.map(jnp.copy, params) if ema else None
    # Three arrays for three zeros, for the same reason.
    zeros = [jnp.zeros((), jnp.int32) for _ in range(3)]
    return TrainState(zeros[0], params, running_mean, optimizer.init(params), zeros[1], zeros[2])

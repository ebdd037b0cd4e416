"""The training state, and its initial value."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes. It is donated to the next step, and checkpoints save it.

    Attributes:
        step: number of steps done, skipped ones included; also the position in the data.
        params: the network's parameters.
        ema: their running mean, or None.
        optimizer: the optimizer's state.
        skipped: number of steps that were skipped because their gradient was not finite.
        skipped_in_a_row: length of the current series of skipped steps.
        constants: the network's arrays that are never trained (RandFormer's matrices), or None. Steps pass them on.
    """

    step: Int[Array, ""]
    params: Any
    ema: Any
    optimizer: optax.OptState
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]
    constants: Any = None

    def variables(self, weights: str = "params") -> dict[str, Any]:
        """What `model.apply` takes: the parameters, or with "ema" their running mean, and the constants."""
        constants = {} if self.constants is None else {"constants": self.constants}
        return {"params": getattr(self, weights), **constants}


def new_state(params: Any, optimizer: optax.GradientTransformation, ema: bool, constants: Any = None) -> TrainState:
    """The state before step 0."""
    # A copy, because the step donates params and ema, and a buffer can be donated only once.
    running_mean = jax.tree.map(jnp.copy, params) if ema else None
    # Three arrays, for the same reason.
    zeros = [jnp.zeros((), jnp.int32) for _ in range(3)]
    return TrainState(zeros[0], params, running_mean, optimizer.init(params), zeros[1], zeros[2], constants)

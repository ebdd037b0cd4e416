"""The best weights of a run by a metric on the held-out split, and when to stop because they no longer improve.

They are a part of the state, so checkpoints hold them: a run that is killed resumes with the same best weights. All
processes see the same evaluations, so they keep the same weights and stop at the same step.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from train.compute.evaluation import AnyEvaluation
from train.compute.state import Best, TrainState
from train.config import BestMetric

_LOWER_IS_BETTER = ("loss", "mae")


def update_best(state: TrainState, evaluations: Mapping[str, AnyEvaluation], metric: BestMetric) -> TrainState:
    """The state with its current weights as the best ones where `metric` is better than before.

    If two evaluations are equally good, the first one counts.
    """
    assert state.best is not None
    sign, name = -1 if metric in _LOWER_IS_BETTER else 1, metric.replace("-", "_")
    best = {
        kind: _better(state.best[kind], getattr(state, kind), state.step, sign * evaluation.summary()[name])
        for kind, evaluation in evaluations.items()
    }
    return state.replace(best=best)


def _better(best: Best, params: Any, step: jax.Array, score: float) -> Best:
    if not np.float32(score) > np.float32(best.score):  # also if the score is NaN
        return best.replace(evaluations_since=_like(best.evaluations_since, int(best.evaluations_since) + 1))
    return Best(
        # A copy, because the next step donates the weights.
        jax.tree.map(lambda array: jax.device_put(array, array.sharding, may_alias=False), params),
        score=_like(best.score, score),
        step=_like(best.step, int(step)),
        evaluations_since=_like(best.evaluations_since, 0),
    )


def _like(array: jax.Array, value: float) -> jax.Array:
    return jax.device_put(np.asarray(value, array.dtype), array.sharding)


def evaluations_without_better(state: TrainState) -> int:
    """The number of evaluations since any kind of weights improved; 0 without --keep-best."""
    return min((int(best.evaluations_since) for best in (state.best or {}).values()), default=0)


def weights_to_publish(state: TrainState) -> dict[str, tuple[int, Any]]:
    """By kind of weights, the step and the variables: the best ones with --keep-best, else those of the state."""
    if state.best is not None:
        best = state.best.items()
        return {kind: (int(one.step), state.variables() | {"params": one.params}) for kind, one in best}
    return {kind: (int(state.step), variables) for kind, variables in current_weights(state).items()}


def current_weights(state: TrainState) -> dict[str, Any]:
    """The variables of the network, and with "ema" those with the running mean of the parameters if there is one."""
    return {kind: state.variables(kind) for kind in ("params", "ema") if getattr(state, kind) is not None}

"""--keep-best keeps the first of the best weights, by each metric."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.compute.best import evaluations_without_better, update_best, weights_to_publish
from train.compute.evaluation import Evaluation
from train.compute.state import new_state


def evaluation(confusion, loss=1.0):
    counts = np.array(confusion)
    examples, correct = counts.sum(1), counts.diagonal()
    return Evaluation(counts.sum(), loss, correct.sum() / counts.sum(), 1.0, examples, correct, counts.sum(0), counts)


# Of 12 and 4 examples: one is the best by top-1, one by the mean of the classes.
GOOD_AT_BOTH, GOOD_AT_THE_FIRST, BAD = [[9, 3], [1, 3]], [[12, 0], [3, 1]], [[6, 6], [2, 2]]


def best_step(metric, evaluations):
    """The step that is kept, of evaluations after the steps 1, 2, ..., and the evaluations since."""
    state = new_state({"w": jnp.zeros(2)}, optax.identity(), ema=False, best=True)
    for step, one in enumerate(evaluations, 1):
        state = state.replace(step=jnp.asarray(step), params={"w": jnp.full(2, float(step))})
        state = update_best(state, {"params": one}, metric)
    ((step, variables),) = weights_to_publish(state).values()
    assert variables["params"]["w"].tolist() == [step, step]
    return step, evaluations_without_better(state)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [("top1", (2, 1)), ("balanced-accuracy", (3, 0)), ("f1", (3, 0)), ("loss", (1, 2))],
)
def test_each_metric_has_its_best_weights(metric, expected):
    noted = [evaluation(BAD, loss=0.1), evaluation(GOOD_AT_THE_FIRST, 0.3), evaluation(GOOD_AT_BOTH, 0.2)]
    assert best_step(metric, noted) == expected


def test_of_equal_evaluations_the_first_is_kept_and_one_that_is_not_a_number_never():
    assert best_step("top1", [evaluation(BAD), evaluation(GOOD_AT_BOTH), evaluation(GOOD_AT_BOTH)]) == (2, 1)
    assert best_step("loss", [evaluation(BAD, np.nan), evaluation(BAD, 2.0), evaluation(BAD, np.nan)]) == (2, 1)

"""Weight decay, learning rates by step and by depth, clipping, and steps without a finite gradient."""

import dataclasses
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict

from golden import make_optimizers
from paths import TESTS
from poolformer_jax import PoolFormerConfig, PoolFormerForImageClassification
from poolformer_jax.errors import InputError
from small_networks import random_variables
from train.compute.optimizer import decay_mask, layer_scales, make_optimizer, make_schedule
from train.compute.state import new_state
from train.compute.step import make_train_step
from train.config import OptimizerConfig
from train.recipes import RECIPES

NETWORK = PoolFormerConfig(
    depths=(1, 2),
    hidden_sizes=(8, 32),
    patch_sizes=(7, 3),
    strides=(4, 2),
    padding=(2, 1),
    token_mixers=("pooling", "attention"),
    position_embeddings=(False, True),
    image_size=16,
    num_labels=10,
)


@pytest.fixture(scope="module")
def params():
    return random_variables(NETWORK)[1]["params"]


def named(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }


def first_update(config, params, gradient):
    """The update for the first gradient, and the optimizer's state."""
    optimizer = make_optimizer(config)
    return jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))(gradient, params)


def test_kernels_decay_and_nothing_else_does(params):
    # By hand, from the network's parts; the position embedding decays as it does with the authors.
    decaying = {
        "stem/conv/kernel",
        "stages_0/blocks_0/mlp/fc1/kernel",
        "stages_0/blocks_0/mlp/fc2/kernel",
        "stages_1/downsample/conv/kernel",
        "stages_1/position_embedding",
        *(f"stages_1/blocks_{b}/mlp/{fc}/kernel" for b in (0, 1) for fc in ("fc1", "fc2")),
        *(f"stages_1/blocks_{b}/token_mixer/{part}/kernel" for b in (0, 1) for part in ("qkv", "proj")),
        "head/kernel",
    }
    assert {name for name, decays in named(decay_mask(params)).items() if decays} == decaying


def test_decay_is_decoupled_from_the_gradient():
    params = {"kernel": np.full((2, 3), 4.0, np.float32), "bias": np.full(3, 4.0, np.float32)}
    updates, _ = first_update(OptimizerConfig(weight_decay=0.25), params, jax.tree.map(np.zeros_like, params))
    np.testing.assert_allclose(updates["kernel"], np.ones((2, 3)), rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)


def test_imagenet_recipes_follow_the_authors_schedule():
    # Values from timm 1.0.31's CosineLRScheduler(t_initial=300, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6) at a
    # peak of 1e-3, for 1251 batches of 1024 an epoch.
    config = RECIPES["imagenet-s12"].config
    steps = config.steps_per_epoch(1_281_167)
    assert (steps, config.total_steps(1_281_167)) == (1251, 310 * 1251)
    schedule = make_schedule(config.optimizer, steps, 1024)
    for epoch, expected in {
        0: 1e-6,
        1: 2.008e-4,
        4: 8.002e-4,
        5: 9.993215829e-4,
        150: 5.05e-4,
        299: 1.002714e-5,
    }.items():
        for step in (epoch * steps, (epoch + 1) * steps - 1):
            assert float(schedule(step)) == pytest.approx(expected, rel=2e-6)
    assert float(schedule(300 * steps)) == float(schedule(310 * steps - 1)) == pytest.approx(1e-5)


def test_more_steps_than_a_state_can_count_are_refused():
    with pytest.raises(InputError, match=r"^1,073,741,824 epochs are 2,147,483,648 steps\. Expected fewer than 2,147"):
        make_schedule(OptimizerConfig(epochs=2**30, cooldown_epochs=0), steps_per_epoch=2, batch_size=1024)


def test_the_schedule_by_steps_is_the_schedule_by_epochs_in_between():
    config = OptimizerConfig(epochs=10, warmup_epochs=2, schedule_every="step", learning_rate_batch=None)
    schedule = make_schedule(config, steps_per_epoch=4, batch_size=7)
    assert float(schedule(2)) == pytest.approx(1e-6 + 0.25 * (1e-3 - 1e-6))
    assert float(schedule(22)) == pytest.approx(1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * 0.55)) / 2)


def test_a_constant_schedule_stays_at_its_peak_after_the_warmup():
    config = OptimizerConfig(epochs=10, warmup_epochs=2, cooldown_epochs=1, schedule="constant")
    schedule = make_schedule(config, steps_per_epoch=4, batch_size=1024)
    assert float(schedule(0)) == pytest.approx(1e-6)
    assert [float(schedule(step)) for step in (8, 39, 43)] == [pytest.approx(1e-3)] * 3
    # Without a final rate to fall to, a smaller peak is no mistake.
    make_schedule(dataclasses.replace(config, warmup_epochs=0), 4, batch_size=1)


def test_the_learning_rate_grows_with_the_batch():
    config = OptimizerConfig(epochs=2, warmup_epochs=0)
    assert float(make_schedule(config, 10, 4096)(0)) == pytest.approx(4e-3)
    fixed = dataclasses.replace(config, learning_rate_batch=None)
    assert float(make_schedule(fixed, 10, 4096)(0)) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("changes", "batch_size", "expected"),
    [
        ({"learning_rate": 5e-6}, 1024, "optimizer.final_learning_rate=1e-05: above"),
        ({"learning_rate": 5e-4}, 2, "9.77e-07 for batches of 2 (optimizer.learning_rate=0.0005 for 1024 images)"),
        ({"learning_rate": 5e-6, "final_learning_rate": 0.0, "warmup_learning_rate": 6e-6}, 1024, "warmup_learning"),
    ],
)
def test_a_learning_rate_that_would_rise_to_the_end_is_refused(changes, batch_size, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        make_schedule(OptimizerConfig(**changes), 10, batch_size)
    from_zero_to_zero = {"final_learning_rate": 0.0, "warmup_learning_rate": 0.0}
    make_schedule(OptimizerConfig(**changes | from_zero_to_zero), 10, batch_size)


def test_layers_learn_slower_with_their_distance_from_the_head(params):
    # Three blocks: stem, block, block, block, norm and head are layers 0 to 4.
    scales = named(layer_scales(params, 0.5))
    expected = {
        "stem/conv/kernel": 1 / 16,
        "stages_0/blocks_0/norm1/scale": 1 / 8,
        "stages_1/downsample/conv/bias": 1 / 4,
        "stages_1/position_embedding": 1 / 4,
        "stages_1/blocks_0/mlp/fc1/kernel": 1 / 4,
        "stages_1/blocks_1/layer_scale_2/scale": 1 / 2,
        "norm/scale": 1.0,
        "head/kernel": 1.0,
    }
    assert {name: scales[name] for name in expected} == expected
    few = {"stem": {"bias": np.ones(2)}, "stages_0": {"blocks_0": {"bias": np.ones(2)}}, "head": {"bias": np.ones(2)}}
    fast_updates, _ = first_update(OptimizerConfig(), few, few)
    slow_updates, _ = first_update(OptimizerConfig(layer_decay=0.5), few, few)
    for name, scale in {"stem/bias": 1 / 4, "stages_0/blocks_0/bias": 1 / 2, "head/bias": 1.0}.items():
        np.testing.assert_allclose(named(slow_updates)[name], named(fast_updates)[name] * scale, rtol=1e-6)


def test_clipping_bounds_the_gradient_before_the_moments():
    gradient = {"kernel": np.full((2, 3), 100.0, np.float32), "bias": np.full(3, 100.0, np.float32)}
    _, state = first_update(OptimizerConfig(clip_norm=1.0, beta1=0.0), gradient, gradient)
    assert float(optax.tree.norm(state[1].mu)) == pytest.approx(1.0, rel=1e-5)


class Linear:
    """A network whose loss has the "pixels", a tree like the parameters, as its gradient."""

    config = PoolFormerConfig(num_labels=2)

    def apply(self, variables, pixels, **_):
        products = jax.tree.map(lambda parameter, slope: (parameter * slope).sum(), variables["params"], pixels)
        return SimpleNamespace(loss=sum(jax.tree.leaves(products)), logits=jnp.zeros((1, 2)))


def twenty_steps(name, **changes):
    """The state after the steps of tests/golden/make_optimizers.py, in float64."""
    peak = make_optimizers.OPTIMIZERS[name][1]
    config = OptimizerConfig(name, **{"weight_decay": make_optimizers.WEIGHT_DECAY} | changes)
    optimizer, schedule = make_optimizer(config), jnp.array([make_optimizers.learning_rate(s, peak) for s in range(20)])
    step = jax.jit(
        make_train_step(Linear(), optimizer, lambda s: schedule[s], lambda key, x, y: (x, y), config, seed=0)
    )
    state = new_state(jax.tree.map(jnp.asarray, make_optimizers.initial()), optimizer, config.ema_decay is not None)
    for number in range(make_optimizers.STEPS):
        state, _ = step(state, {"image": make_optimizers.gradients(number), "label": np.zeros((1, 2))})
    return jax.device_get(state)


def assert_golden(name, kind, tree):
    golden = np.load(TESTS / "golden" / "optimizers.npz")
    for key, value in tree.items():
        np.testing.assert_allclose(value, golden[f"{name}/{kind}/{key}"], rtol=1e-9, atol=1e-12, err_msg=key)


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("name", make_optimizers.OPTIMIZERS)
def test_twenty_steps_of_an_optimizer_and_of_the_running_mean_are_those_of_timm(name, warmup):
    with jax.enable_x64(True):
        state = twenty_steps(name, ema_decay=make_optimizers.EMA_DECAY, ema_warmup=warmup)
    assert_golden(name, "params", state.params)
    assert_golden(name, "warm_ema" if warmup else "ema", state.ema)


@pytest.mark.parametrize("changes", [{"clip_norm": math.inf}, {"epsilon": 1e-8}, {"weight_decay": 0.0}])
def test_the_golden_numbers_catch_another_lamb(changes):
    with jax.enable_x64(True):
        state = twenty_steps("lamb", **changes)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_golden("lamb", "params", state.params)


def test_lamb_without_weight_decay_is_adamw():
    common = {"weight_decay": 0.0, "clip_norm": 1.0, "epsilon": 1e-6}
    gradient = {"kernel": np.full((2, 3), 0.1, np.float32)}
    updates = [first_update(OptimizerConfig(name, **common), gradient, gradient)[0] for name in ("adamw", "lamb")]
    np.testing.assert_array_equal(updates[0]["kernel"], updates[1]["kernel"])


def a_step_with(**changes):
    """A state of four small parts of a network, and the state after one step of `changes` to the optimizer."""
    config = OptimizerConfig(warmup_epochs=0, ema_decay=0.9, **changes)
    optimizer = make_optimizer(config)
    names = ("stem/kernel", "stages_0/blocks_0/norm1/scale", "stages_1/blocks_0/norm1/scale", "head/kernel")
    params = unflatten_dict({tuple(name.split("/")): jnp.full((2, 2), 0.1) for name in names})
    slopes = jax.tree.map(lambda array: 0.3 * array, params)
    start = new_state(params, optimizer, ema=True)
    step = make_train_step(Linear(), optimizer, lambda s: 0.01, lambda key, x, y: (x, y), config, seed=0)
    return start, step(start, {"image": slopes, "label": np.zeros((1, 2))})[0]


@pytest.mark.parametrize(
    ("freeze", "learnt"),
    [
        (("backbone",), {"head/kernel"}),
        (("stem", "stages_0"), {"stages_1/blocks_0/norm1/scale", "head/kernel"}),
        (("*/norm?",), {"stem/kernel", "head/kernel"}),
        (("stages_*/scale", "head/kernel"), {"stem/kernel"}),
    ],
)
@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd"])
def test_frozen_parameters_keep_every_bit_and_have_no_moments(name, freeze, learnt):
    start, after = a_step_with(name=name, freeze=freeze)
    for tree, before in ((after.params, start.params), (after.ema, start.ema)):
        values, first = named(tree), named(before)
        assert {one for one in values if not np.array_equal(values[one], first[one])} == learnt
    moments = {one.rsplit("/", 3)[-1] for one in named(after.optimizer) if one.endswith(("kernel", "scale"))}
    assert moments == {one.rsplit("/", 1)[-1] for one in learnt}


def test_a_frozen_gradient_does_not_count_in_the_norm_that_is_clipped():
    _, clipped = a_step_with(name="sgd", weight_decay=0.0, freeze=("backbone",), clip_norm=0.06)
    _, free = a_step_with(name="sgd", weight_decay=0.0, freeze=("backbone",))
    # The head's gradient alone has a norm of 0.06.
    np.testing.assert_allclose(named(clipped.params)["head/kernel"], named(free.params)["head/kernel"], rtol=1e-6)


@pytest.mark.parametrize(
    ("freeze", "problem"),
    [(("stage_0",), "no parameter is named stage_0"), (("backbone", "head"), "nothing is left to learn")],
)
def test_freezing_nothing_or_everything_is_refused(freeze, problem):
    with pytest.raises(ValueError, match=problem):
        a_step_with(freeze=freeze)


@pytest.mark.slow  # compiles two training steps
def test_the_backward_pass_ends_where_everything_below_is_frozen(params, optimised):
    def flops(**changes):
        config = OptimizerConfig(warmup_epochs=0, **changes)
        optimizer = make_optimizer(config)
        step = make_train_step(
            PoolFormerForImageClassification(NETWORK),
            optimizer,
            lambda s: 0.01,
            lambda key, x, y: (x, jax.nn.one_hot(y, 10)),
            config,
            seed=0,
        )
        state = jax.eval_shape(lambda p: new_state(p, optimizer, ema=False), params)
        return jax.jit(step).lower(state, batch()).compile().cost_analysis()["flops"]

    assert flops(freeze=("backbone",)) < 0.5 * flops()


@pytest.fixture(scope="module")
def step_and_state(params):
    model = PoolFormerForImageClassification(NETWORK)
    config = OptimizerConfig(epochs=10, warmup_epochs=0, schedule_every="step", ema_decay=0.9)
    optimizer = make_optimizer(config)
    step = make_train_step(
        model, optimizer, make_schedule(config, 1, 1024), lambda key, x, y: (x, jax.nn.one_hot(y, 10)), config, seed=0
    )
    return jax.jit(step), jax.jit(lambda p: new_state(p, optimizer, ema=True))(params)


def batch(value: float = 1.0):
    pixels = np.random.default_rng(1).normal(size=(4, 16, 16, 3)).astype(np.float32)
    pixels[0, 0, 0, 0] = value
    return {"image": pixels, "label": np.arange(4)}


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_counters(step_and_state, poison):
    step, start = step_and_state
    before, _ = step(start, batch())
    after, metrics = step(before, batch(poison))
    assert not np.isfinite(metrics["loss"])
    for name in ("params", "ema", "optimizer"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))
    assert [int(after.step), int(after.skipped), int(after.skipped_in_a_row)] == [2, 1, 1]
    again, _ = step(after, batch())
    assert [int(again.step), int(again.skipped), int(again.skipped_in_a_row)] == [3, 1, 0]


def test_a_skipped_step_does_not_shift_the_learning_rate(step_and_state):
    step, state = step_and_state
    rates = []
    for value in (1.0, math.nan, 1.0):
        state, metrics = step(state, batch(value))
        rates.append(float(metrics["learning_rate"]))
    schedule = make_schedule(OptimizerConfig(epochs=10, warmup_epochs=0, schedule_every="step"), 1, 1024)
    assert rates == pytest.approx([float(schedule(number)) for number in range(3)])


def test_the_running_mean_follows_the_weights(step_and_state):
    step, start = step_and_state
    state, _ = step(start, batch())
    expected = jax.tree.map(lambda old, new: 0.9 * np.asarray(old) + 0.1 * np.asarray(new), start.ema, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9), state.ema, expected)


def test_the_values_that_an_optimizer_uses_are_those_of_the_recipe():
    used = {name: OptimizerConfig(name).with_defaults() for name in make_optimizers.OPTIMIZERS}
    values = {name: (config.beta2, config.epsilon, config.clip_norm) for name, config in used.items()}
    assert values == {
        "adamw": (0.999, 1e-8, None),
        "lamb": (0.999, 1e-6, 1.0),
        "lion": (0.99, None, None),
        "sgd": (None, None, None),
    }
    given = OptimizerConfig("lamb", beta2=0.9, epsilon=1e-3, clip_norm=math.inf)
    assert given.with_defaults() == given


def test_values_out_of_range_are_named_together():
    with pytest.raises(ValueError, match="ema_warmup=True: expected ema_decay too"):
        OptimizerConfig(ema_warmup=True)
    with pytest.raises(ValueError, match=r"(?s)warmup_epochs=5: expected.*layer_decay=1.5: expected"):
        OptimizerConfig(epochs=5, warmup_epochs=5, layer_decay=1.5)

"""Twenty training steps equal PyTorch's: same weights, same batches, same schedule and optimizer, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden import fixture_values
from golden.family import make_training_runs
from network import family_weights
from paths import TESTS
from poolformer_jax import MetaFormerForImageClassification, PoolFormerConfig, PoolFormerForImageClassification
from poolformer_jax.network import leaves_by_path
from poolformer_jax.weights import from_torch_state_dict, to_torch_state_dict
from train.compute.optimizer import make_optimizer, make_schedule
from train.compute.state import new_state
from train.compute.step import make_train_step
from train.config import OptimizerConfig
from train.recipes import RECIPES

STEPS = 20
# What the golden run's README says of it; its network is this.
NETWORK = PoolFormerConfig(depths=(1, 1, 2, 1), hidden_sizes=(16, 32, 40, 64), num_labels=10)
RECIPE = OptimizerConfig(
    learning_rate=2e-3,
    learning_rate_batch=None,
    epochs=STEPS,
    warmup_epochs=5,
    cooldown_epochs=0,
    weight_decay=0.05,
)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(TESTS / "golden" / "training_run.npz") as archive:
        return dict(archive)


def batch(step: int) -> dict[str, jax.Array]:
    pixels = 1.5 * fixture_values.uniform(f"train/pixels/{step % 4}", (8, 3, 64, 64))
    return {"image": jnp.asarray(pixels.transpose(0, 2, 3, 1)), "label": (jnp.arange(8) * 7 + step % 4) % 10}


def smooth_labels(key, image, label):
    return image, 0.9 * jax.nn.one_hot(label, 10, dtype=jnp.float64) + 0.1 / 10


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")  # float64 convolutions run ten times as fast
def test_twenty_steps_equal_the_golden_run(golden):
    names = {key.removeprefix("final_l2/"): None for key in golden if key.startswith("final_l2/")}
    with jax.enable_x64(True):
        shapes = jax.eval_shape(
            lambda: PoolFormerForImageClassification(NETWORK).init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
        )
        blank = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
        layout = to_torch_state_dict(NETWORK, blank, "hf")
        assert layout.keys() == names.keys()
        weights = {name: fixture_values.parameter(name, array.shape) for name, array in layout.items()}
        _, variables = from_torch_state_dict(weights, NETWORK)
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), variables["params"])

        model = PoolFormerForImageClassification(NETWORK, dtype=jnp.float64)
        optimizer = make_optimizer(RECIPE)
        schedule = make_schedule(RECIPE, steps_per_epoch=1, batch_size=8)
        step = jax.jit(make_train_step(model, optimizer, schedule, smooth_labels, RECIPE, seed=0))
        state, rows = new_state(params, optimizer, ema=False), []
        for number in range(STEPS):
            state, metrics = step(state, batch(number))
            rows.append(metrics)
        final = to_torch_state_dict(NETWORK, {"params": state.params}, "hf")

    for ours, theirs in (("learning_rate", "learning_rate"), ("loss", "loss"), ("gradient_norm", "grad_norm")):
        np.testing.assert_allclose([float(row[ours]) for row in rows], golden[theirs], rtol=1e-6, err_msg=ours)
    for name in names:
        norm = np.linalg.norm(np.asarray(final[name], np.float64))
        np.testing.assert_allclose(norm, golden[f"final_l2/{name}"], rtol=1e-6, err_msg=name)


# The recipes whose optimizer and schedule the runs of timm have.
FAMILY_RECIPES = {
    "convformer": "imagenet-convformer_s18",
    "caformer": "imagenet-caformer_s18",
    "caformer_384": "imagenet-caformer_s18_384",
}


@pytest.mark.slow  # compiles three training steps in float64
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("name", FAMILY_RECIPES)
def test_twenty_steps_of_a_recipe_of_the_second_paper_equal_those_of_timm(name):
    run = make_training_runs.RUNS[name]
    recipe = dataclasses.replace(
        RECIPES[FAMILY_RECIPES[name]].config.optimizer,
        learning_rate_batch=None,
        epochs=STEPS,
        warmup_epochs=5 if run.cosine else 0,
    )
    config = family_weights.config("timm", f"{run.kind}_tiny")
    with jax.enable_x64(True):
        model, optimizer = MetaFormerForImageClassification(config, dtype=jnp.float64), make_optimizer(recipe)
        schedule = make_schedule(recipe, steps_per_epoch=1, batch_size=8)
        step = jax.jit(make_train_step(model, optimizer, schedule, smooth_labels, recipe, seed=0))
        params = jax.tree.map(jnp.asarray, family_weights.variables("timm", config, np.float64)["params"])
        state, rows = new_state(params, optimizer, ema=recipe.ema_decay is not None), []
        for number in range(STEPS):
            state, metrics = step(state, batch(number))
            rows.append(metrics)
        found = {
            "learning_rate": [row["learning_rate"] for row in rows],
            "loss": [row["loss"] for row in rows],
            "grad_norm": [row["gradient_norm"] for row in rows],
        }
        kinds = {"final": state.params} | ({} if state.ema is None else {"ema": state.ema})
        for kind, tree in kinds.items():
            for path, leaf in leaves_by_path(config, {"params": tree}).items():
                found[f"{kind}_l2/{family_weights.name_of('timm', path)}"] = [jnp.linalg.norm(leaf.ravel())]
    found = {f"{name}/{key}/{i}": float(value) for key, values in found.items() for i, value in enumerate(values)}
    with np.load(TESTS / "golden" / "family" / "training_runs.npz") as archive:
        golden = {key: value for key, value in zip(archive["keys"], archive["values"]) if key.startswith(f"{name}/")}
    assert found.keys() == golden.keys()
    for key, value in golden.items():
        assert found[key] == pytest.approx(value, rel=1e-9), key

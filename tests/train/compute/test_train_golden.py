"""Twenty training steps equal PyTorch's: same weights, same batches, same schedule, AdamW in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden import fixture_values
from paths import TESTS
from poolformer_jax import PoolFormerConfig, PoolFormerForImageClassification
from poolformer_jax.weights import from_torch_state_dict, to_torch_state_dict
from train.compute.optimizer import make_optimizer, make_schedule
from train.compute.state import new_state
from train.compute.step import make_train_step
from train.config import OptimizerConfig

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

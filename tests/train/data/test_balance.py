"""Class weights and the balanced order: every class counts the same, exactly, on any number of processes."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight

from poolformer_jax import PoolFormerConfig
from poolformer_jax.errors import InputError
from poolformer_jax.network.loss import mean_loss
from small_data import SMALL, assert_same, take
from train.command_line import main
from train.compute.optimizer import make_optimizer, make_schedule
from train.compute.state import new_state
from train.compute.step import make_train_step
from train.config import OptimizerConfig
from train.data import DIGITS, ArraySource, balanced_weights, class_counts, open_source
from train.data.balance import BalancedOrder

COUNTS = (100, 3, 50, 1, 7)
BALANCED = dataclasses.replace(SMALL, sampling="balanced")


@pytest.fixture(scope="module")
def source():
    """Five classes of very different sizes, in the order of their labels."""
    labels = np.repeat(np.arange(5), COUNTS)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8), np.uint8)
    return ArraySource(images, labels, tuple(map(str, range(len(labels)))), tuple("abcde"))


def test_every_block_holds_each_class_equally_often_in_random_order(source):
    order = BalancedOrder(source, seed=3)
    labels = source.labels[[order(position) for position in range(3 * 260)]]
    for block in labels.reshape(3, 260):
        assert np.bincount(block).tolist() == [52] * 5
    # As often as by chance: mixup mixes neighbours.
    assert 0.1 < np.mean(labels[::2] == labels[1::2]) < 0.3


def test_a_class_shows_each_of_its_images_once_a_pass(source):
    order = BalancedOrder(source, seed=3)
    seen = np.array([order(position) for position in range(260 * 25)])
    for label, count in enumerate(COUNTS):
        times = np.bincount(seen, minlength=len(source))[source.labels == label]
        assert times.sum() == 52 * 25
        assert times.max() - times.min() <= 1 + 52 // count  # a block may end inside a pass


def test_balanced_batches_are_the_same_on_any_number_of_processes_workers_and_restarts(source):
    alone = take(BALANCED, source, 6)
    parts = [take(BALANCED, source, 6, process_index=p, process_count=2) for p in range(2)]
    together = [{name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in zip(*parts)]
    assert_same(together, alone)
    assert_same(take(BALANCED, source, 2, start_step=4), alone[4:])
    assert_same(take(dataclasses.replace(BALANCED, workers=2), source, 4), alone[:4])
    (late,) = take(BALANCED, source, 1, start_step=10**12)
    assert (late["index"] >= 0).all()
    assert not np.array_equal(take(dataclasses.replace(BALANCED, seed=43), source, 1)[0]["index"], alone[0]["index"])


def test_balanced_weights_are_those_of_scikit_learn(source):
    assert class_counts(source).tolist() == list(COUNTS)
    expected = compute_class_weight("balanced", classes=np.arange(5), y=source.labels)
    np.testing.assert_allclose(balanced_weights(source), expected)


def test_a_class_without_images_has_no_weight(source):
    with pytest.raises(InputError, match=r"no training image.*: d"):
        balanced_weights(dataclasses.replace(source, labels=np.where(source.labels == 3, 2, source.labels)))


def test_labels_that_are_not_classes_are_refused(source):
    with pytest.raises(InputError, match=r"from 0 to 4. Expected 0 to 3"):
        BalancedOrder(dataclasses.replace(source, class_names=tuple("abcd")), seed=0)


class Linear:
    """A model whose logits are the pixels plus a bias."""

    config = PoolFormerConfig(num_labels=3)

    def apply(self, variables, pixels, labels, train, rngs):
        logits = pixels + variables["params"]["bias"]
        return SimpleNamespace(logits=logits, loss=mean_loss(self.config, logits, labels))


def test_the_weighted_loss_is_the_mean_of_the_weighted_cross_entropies():
    config = OptimizerConfig(learning_rate_batch=None, epochs=2, warmup_epochs=0, accumulate=2)
    optimizer, pixels = make_optimizer(config), np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    schedule, weights, labels = make_schedule(config, 1, 4), np.array([3.0, 0.5, 0.5]), np.array([0, 1, 2, 1])
    step = make_train_step(
        Linear(), optimizer, schedule, lambda key, x, y: (x, jax.nn.one_hot(y, 3)), config, 0, class_weights=weights
    )
    state = new_state({"bias": jnp.zeros(3)}, optimizer, ema=False)
    _, metrics = jax.jit(step)(state, {"image": pixels, "label": labels})
    probability = np.exp(pixels)[range(4), labels] / np.exp(pixels).sum(1)
    assert metrics["loss"] == pytest.approx(np.mean(-weights[labels] * np.log(probability)), rel=1e-6)


# The figures of docs/data.md are of the recipe itself, without these.
SHORT = (
    *("--optimizer.epochs", "4", "--optimizer.warmup-epochs", "1", "--optimizer.learning-rate", "0.02"),
    *("--model.depths", "1", "1", "--model.hidden-sizes", "16", "32", "--data.batch-size", "32"),
    *("--data.augment.max-rotation", "0", "--data.augment.max-shift", "0"),
)


@pytest.mark.slow
def test_balanced_sampling_helps_small_classes(tmp_path):
    """Three of about 144 training images are left of every even digit; all held-out images are there."""
    for split in ("train", "validation"):
        source = open_source(DIGITS, split)
        for label in range(10):
            members = np.flatnonzero(source.labels == label)
            folder = tmp_path / "thinned" / split / str(label)
            folder.mkdir(parents=True)
            for row in members[: 3 if split == "train" and label % 2 == 0 else None]:
                Image.fromarray(source.images[row]).save(folder / f"{row}.png")
    plain = balanced_accuracy(tmp_path, "plain", *SHORT)
    assert balanced_accuracy(tmp_path, "sampling", *SHORT, "--data.sampling", "balanced") > plain + 0.2


def balanced_accuracy(folder, run, *flags):
    common = ["--data.source", f"folder:{folder}/thinned", "--data.workers", "0", "--evaluate-every", "40"]
    assert main(["digits", *common, "--run-dir", str(folder / run), "--distributed.mode", "off", *flags]) == 0
    return json.loads((folder / run / "model" / "evaluation.json").read_text())["balanced_accuracy"]

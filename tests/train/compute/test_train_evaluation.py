"""An evaluation counts every example of the split once, for any batch size, padding and devices."""

import dataclasses
import multiprocessing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from poolformer_jax.network.functional import cross_entropy
from selection import slow_after
from train import loop
from train.compute.evaluation import evaluate
from train.data import evaluation_batches, evaluation_steps, normalize_batch, open_source
from training import first_state, open_and_make_parts, run, sharded, tiny


@pytest.fixture(scope="module")
def split():
    """89 examples, which no batch size divides."""
    return open_source(dataclasses.replace(tiny().data, synthetic_examples=89), "validation")


@pytest.fixture(scope="module")
def params():
    # Far from the start, so that classes differ.
    state = first_state(tiny(mesh=sharded(1, 1)))
    return jax.tree.map(lambda leaf: np.asarray(leaf) * 3, state.params)


def evaluate_on(split, params, batch_size, data, fsdp):
    config = tiny(mesh=sharded(data, fsdp), data__batch_size=batch_size)
    _, parts = open_and_make_parts(config, jax.devices()[: data * fsdp])
    placed = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, parts.abstract_state.params))
    with evaluation_batches(config.data, split) as batches:
        return evaluate(parts.evaluation_step, {"params": {"params": placed}}, batches, parts.mesh, keep_logits=True)[
            "params"
        ]


@pytest.fixture(scope="module")
def by_hand(split, params):
    """Everything at once, on one device, without batches or masks."""
    _, parts = open_and_make_parts(tiny(mesh=sharded(1, 1)), jax.devices()[:1])
    config = tiny(data__batch_size=89)
    with evaluation_batches(config.data, split) as batches:
        (batch,) = list(batches)
    pixels = normalize_batch(jnp.asarray(batch["image"]), config.data, jnp.float32)
    logits = np.asarray(jax.jit(parts.network.model.apply)({"params": params}, pixels).logits)
    order = np.argsort(-logits, axis=1)
    hits = order == batch["label"][:, None]
    return {
        "loss": float(cross_entropy(jnp.asarray(logits), jnp.asarray(batch["label"])).mean()),
        "top1": hits[:, 0].mean(),
        "top5": hits[:, :5].any(1).mean(),
        "labels": batch["label"],
        "logits": logits,
        "best": order[:, 0],
    }


@pytest.mark.parametrize(("batch_size", "data", "fsdp"), slow_after(2, [(32, 1, 1), (64, 4, 2), (8, 1, 1), (96, 1, 8)]))
def test_any_batch_and_mesh_gives_the_result_of_the_whole_split(split, params, by_hand, batch_size, data, fsdp):
    found = evaluate_on(split, params, batch_size, data, fsdp)
    assert found.examples == 89
    assert (found.top1, found.top5) == (pytest.approx(by_hand["top1"]), pytest.approx(by_hand["top5"]))
    assert found.loss == pytest.approx(by_hand["loss"], rel=1e-5)
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (by_hand["labels"], by_hand["best"]), 1)
    np.testing.assert_array_equal(found.confusion, confusion)
    np.testing.assert_array_equal(found.class_examples, np.bincount(by_hand["labels"], minlength=10))
    np.testing.assert_array_equal(found.class_correct, confusion.diagonal())
    np.testing.assert_array_equal(found.class_predicted, confusion.sum(0))
    assert found.predictions.index.tolist() == list(range(89))
    np.testing.assert_array_equal(found.predictions.label, by_hand["labels"])
    np.testing.assert_allclose(found.predictions.logits, by_hand["logits"], rtol=1e-4, atol=1e-5)
    answers = by_hand["labels"], by_hand["best"]
    assert found.balanced_accuracy == pytest.approx(sklearn.metrics.balanced_accuracy_score(*answers))
    assert found.f1 == pytest.approx(sklearn.metrics.f1_score(*answers, average="macro"))


def test_all_kinds_of_weights_are_scored_on_one_pass_over_the_split(split, params, by_hand):
    config = tiny(mesh=sharded(1, 1))
    _, parts = open_and_make_parts(config, jax.devices()[:1])
    untrained = jax.tree.map(lambda leaf: leaf / 3, params)
    with evaluation_batches(config.data, split) as batches:
        found = evaluate(
            parts.evaluation_step, {"params": {"params": params}, "ema": {"params": untrained}}, batches, parts.mesh
        )
    assert list(found) == ["params", "ema"]
    assert (found["params"].examples, found["ema"].examples) == (89, 89)
    assert found["params"].loss == pytest.approx(by_hand["loss"], rel=1e-5)
    assert found["ema"].loss != pytest.approx(by_hand["loss"], rel=1e-2)


def test_padding_does_not_count_even_if_its_loss_is_infinite(split, params):
    _, parts = open_and_make_parts(tiny(mesh=sharded(1, 1)), jax.devices()[:1])
    mask = np.arange(32) < 3
    # Padding has a class to which the network gives probability 0.
    batch = {"image": np.zeros((32, 16, 16, 1), np.uint8), "label": np.where(mask, 0, 9).astype(np.int32), "mask": mask}
    never_9 = {**params, "head": {**params["head"], "bias": jnp.asarray(params["head"]["bias"]).at[9].set(-jnp.inf)}}
    found = evaluate(parts.evaluation_step, {"params": {"params": never_9}}, [batch], parts.mesh)["params"]
    assert (found.examples, found.class_examples.tolist()) == (3, [3] + [0] * 9)
    assert np.isfinite(found.loss)
    everything_masked = {**batch, "mask": np.zeros(32, bool)}
    with pytest.raises(ValueError, match="No image"):
        evaluate(parts.evaluation_step, {"params": {"params": never_9}}, [everything_masked], parts.mesh)


def test_an_empty_split_is_refused(params):
    _, parts = open_and_make_parts(tiny(mesh=sharded(1, 1)), jax.devices()[:1])
    with pytest.raises(ValueError, match="no example"):
        evaluate(parts.evaluation_step, {"params": {"params": params}}, [], parts.mesh)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_every_pass_of_repeated_batches_is_the_whole_split_bit_for_bit(split, workers):
    config = dataclasses.replace(tiny().data, workers=workers)
    steps = evaluation_steps(config, split)
    for process in range(2):
        part = {"process_index": process, "process_count": 2}
        with evaluation_batches(config, split, **part) as batches:
            once = list(batches)
        with evaluation_batches(config, split, repeat=True, **part) as batches:
            passes = [[next(batches) for _ in range(steps)] for _ in range(3)]
        assert len(once) == steps
        for one in passes:
            jax.tree.map(np.testing.assert_array_equal, one, once)


@pytest.mark.slow
def test_the_evaluations_of_a_run_share_their_workers_which_end_with_it(tmp_path, monkeypatch):
    def watched(*arguments):
        result = evaluate(*arguments)
        seen.append({worker.pid for worker in multiprocessing.active_children()})
        return result

    seen: list[set[int | None]] = []
    monkeypatch.setattr(loop, "evaluate", watched)
    config = tiny(tmp_path, mesh=sharded(8, 1), data__workers=1, max_steps=9)  # 3 steps are an epoch
    run(config)
    assert len(seen) == 3
    assert len(set.union(*seen)) == 2  # one of training's and one of evaluation's
    assert not multiprocessing.active_children()

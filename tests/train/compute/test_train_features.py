"""A head learns the same from features that are computed once as through the frozen network."""

import json

import jax
import numpy as np
import pytest

from train import setup
from train.compute.features import learns_from_features
from train.data import HostAugmentation
from train.network import make_network
from training import run, tiny

HEAD_ONLY = {
    "optimizer__freeze": ("backbone",),
    "model__drop_path_rate": 0.0,
    "data__augment": HostAugmentation(crop="evaluation", horizontal_flip=0.0, randaugment="none"),
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"optimizer__freeze": ("stem", "stages_*", "norm")}, True),
        ({"optimizer__freeze": ("stem", "stages_*")}, False),
        ({"optimizer__freeze": ()}, False),
        ({"model__drop_path_rate": 0.1}, False),
        ({"data__augment": HostAugmentation(crop="evaluation", randaugment="none")}, False),  # it flips
    ],
)
def test_features_are_computed_once_if_nothing_below_the_head_changes(changes, expected):
    config = tiny(**(HEAD_ONLY | changes))
    network = make_network(config, ("a", "b"))
    params = jax.eval_shape(network.make_variables, jax.random.key(0))["params"]
    assert learns_from_features(config, network.model.config, params, images=96) is expected
    assert not learns_from_features(config, network.model.config, params, images=10**9)  # no memory


@pytest.mark.slow
def test_a_head_learns_the_same_from_features_as_from_images(tmp_path, monkeypatch):
    changes = HEAD_ONLY | {"model__head_dropout_rate": 0.2, "evaluate_every": 2, "data__batch_size": 40}
    outcomes = [run(tiny(tmp_path / "features", **changes))]
    monkeypatch.setattr(setup, "learns_from_features", lambda *arguments: False)
    outcomes.append(run(tiny(tmp_path / "images", **changes)))
    features, images = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("features", "images")
    )
    assert len(features) == len(images)
    for found, wanted in zip(features, images):
        for name in {"loss", "accuracy", "gradient_norm", "top1"} & wanted.keys():
            assert found[name] == pytest.approx(wanted[name], rel=1e-4)
    for found, wanted in zip(*(outcome.evaluations.values() for outcome in outcomes)):
        assert found.examples == wanted.examples == 96
        np.testing.assert_allclose(found.predictions.logits, wanted.predictions.logits, atol=1e-5)
        np.testing.assert_array_equal(found.predictions.label, wanted.predictions.label)

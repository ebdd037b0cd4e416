"""The network that a run starts from: fresh, or with weights that were there already."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from train.data.config import DataConfig
from train.network import make_network
from train.network_config import FreshNetwork, PretrainedNetwork
from training import tiny

WEIGHTS = PretrainedNetwork(source=str(Path(__file__).parent / "fixtures" / "hf_sharded"))


def network_for(class_names, wanted=WEIGHTS, seed=0):
    return make_network(tiny(model=wanted, data=DataConfig(), seed=seed), class_names)


def parameters(seed):
    """What a run with this seed starts from: a file of weights with a new head for two classes."""
    network = network_for(("daisy", "tulip"), seed=seed)
    return network.make_params(network.argument())


def test_the_seed_of_a_run_draws_the_new_head_of_loaded_weights_and_nothing_else():
    first, again, other = parameters(1), parameters(1), parameters(2)
    jax.tree.map(np.testing.assert_array_equal, again, first)
    assert not np.array_equal(other["head"].pop("kernel"), first["head"].pop("kernel"))
    jax.tree.map(np.testing.assert_array_equal, other, first)


KEPT = dataclasses.replace(WEIGHTS, keep_head=True)  # of cat, dog, axolotl


@pytest.mark.parametrize("names", [("cat", "dog", "axolotl"), ("n02121808", "n02084071", "n01632777")])
def test_a_head_is_kept_for_its_own_classes_or_for_another_vocabulary(names):
    assert dict(network_for(names, KEPT).model.config.id2label) == dict(enumerate(names))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("axolotl", "cat", "dog"), "(?s)the same classes in another order.*label 0: cat in the model, axolotl in"),
        (("dog", "axolotl", "zebra"), "(?s)some classes in common only.*label 2: axolotl in the model, zebra in"),
        (("cat", "dog", "zebra"), "(?s)some classes in common only.*label 2: axolotl in the model, zebra in"),
        (("cat", "dog"), "tells 3 classes apart, and the data has 2"),
    ],
)
def test_a_head_is_not_kept_for_other_classes(names, message):
    with pytest.raises(ValueError, match=f"{message}.*leave --model.keep-head away"):
        network_for(names, KEPT)


@pytest.mark.parametrize("wanted", [WEIGHTS, FreshNetwork()])
def test_a_network_for_a_single_class_is_refused(wanted):
    with pytest.raises(ValueError, match=r"The data has 1 class, images: .* name the folder that holds one folder per"):
        network_for(("images",), wanted)

"""The network that a run starts from: fresh, or with weights that were there already."""

from pathlib import Path

import jax
import numpy as np

from train.network import PretrainedNetwork, make_network

WEIGHTS = PretrainedNetwork(source=str(Path(__file__).parent / "fixtures" / "hf_sharded"))


def parameters(seed):
    """What a run with this seed starts from: a file of weights with a new head for two classes."""
    network = make_network(WEIGHTS, ("daisy", "tulip"), 64, 3, dtype="float32", remat=False, kernels=None, seed=seed)
    return network.make_params(network.argument)


def test_the_seed_of_a_run_draws_the_new_head_of_loaded_weights_and_nothing_else():
    first, again, other = parameters(1), parameters(1), parameters(2)
    jax.tree.map(np.testing.assert_array_equal, again, first)
    assert not np.array_equal(other["head"].pop("kernel"), first["head"].pop("kernel"))
    jax.tree.map(np.testing.assert_array_equal, other, first)

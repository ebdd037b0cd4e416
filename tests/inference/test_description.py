"""A token mixer and an activation added from outside are trained, folded, exported, counted and stored."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poolformer_jax import export_model, from_torch_state_dict, to_torch_state_dict
from poolformer_jax.inference import description
from poolformer_jax.inference.cost_operations import layer_table
from poolformer_jax.inference.folding import fold
from poolformer_jax.inference.jax_operations import folded_apply
from poolformer_jax.network import functional, parameter_table, token_mixers
from small_networks import LABELS, PROCESSOR, TWO_STAGES, random_variables


def gated_pooling(config, params, x):
    return functional.pooling_mixer(x, 3) * jax.nn.sigmoid(functional.dense(x, **params["gate"]))


def describe_gated_pooling(ops, config, params, x):
    return ops.multiply(ops.pooling(x, 3), ops.elementwise(ops.dense(x, params["gate"]), "sigmoid"))


@pytest.fixture
def network(monkeypatch):
    """A config with a token mixer and an activation that this test adds, its model and its parameters."""
    gate = "gate/kernel  c c  normal\ngate/bias  c  zeros"
    monkeypatch.setitem(parameter_table.MIXER_PARAMETERS, "gated_pooling", gate)
    monkeypatch.setitem(token_mixers.TOKEN_MIXERS, "gated_pooling", gated_pooling)
    monkeypatch.setitem(description.TOKEN_MIXERS, "gated_pooling", describe_gated_pooling)
    monkeypatch.setitem(functional.ACTIVATIONS, "bump", lambda x: x * jnp.tanh(x))
    describe_bump = lambda ops, x: ops.multiply(x, ops.elementwise(x, "tanh"))  # noqa: E731
    monkeypatch.setitem(description.ACTIVATIONS, "bump", describe_bump)
    config = dataclasses.replace(TWO_STAGES, token_mixers=("pooling", "gated_pooling"), hidden_act="bump", num_labels=7)
    return config, *random_variables(config)


PIXELS = np.random.default_rng(0).standard_normal((2, 64, 64, 3)).astype(np.float32)


def test_a_gradient_step_trains_it(network):
    _, model, variables = network

    def loss(params):
        return model.apply({"params": params}, PIXELS, jnp.array([1, 4]), train=True).loss

    before, gradient = jax.jit(jax.value_and_grad(loss))(variables["params"])
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["stages_1"]["blocks_0"]["token_mixer"]))
    stepped = jax.tree.map(lambda leaf, slope: leaf - 1e-3 * slope, variables["params"], gradient)
    assert jax.jit(loss)(stepped) < before


def test_it_is_folded(network):
    config, model, variables = network
    expected = jax.jit(model.apply)(variables, PIXELS).logits
    logits = jax.jit(folded_apply, static_argnums=0)(config, fold(config, variables), PIXELS)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_onnx_runtime_computes_it(network, tmp_path):
    pytest.importorskip("onnxruntime")
    config, _, variables = network
    assert 0 < export_model(tmp_path / "network.onnx", config, variables, PROCESSOR, LABELS) < 1e-5


def test_its_parameters_and_macs_are_counted(network):
    with_gate = layer_table(network[0], 64, 64)[3]
    without = layer_table(TWO_STAGES, 64, 64)[3]
    assert with_gate.name == "stages_1/blocks_0 (gated_pooling)"
    channels, positions = 12, 8 * 8
    assert with_gate.parameters - without.parameters == channels**2 + channels
    assert with_gate.macs - without.macs == positions * channels**2


def test_its_weights_are_stored_and_read(network):
    config, _, variables = network
    stored = to_torch_state_dict(config, variables, "jax")
    assert stored["stages_1/blocks_0/token_mixer/gate/kernel"].shape == (12, 12)
    found, read = from_torch_state_dict(stored, config)
    assert found == config
    jax.tree.map(np.testing.assert_array_equal, read, jax.device_get(variables))

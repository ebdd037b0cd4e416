"""Training of the second paper's networks: what decays, what stays as it is, and whole runs of small ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from poolformer_jax import MetaFormerForImageClassification, load_pretrained, save_pretrained
from poolformer_jax.network import all_parameters, initial_value
from small_networks import random_variables
from train.commands.doctor import examine
from train.compute import evaluate
from train.compute.optimizer import decay_mask, layer_scales
from train.config import FreshNetwork, PretrainedNetwork
from train.data import DataConfig, evaluation_batches, open_source
from train.network import make_network
from train.recipes import RECIPES
from train.resume.record import read_record
from training import ALONE, first_state, open_and_make_parts, run, sharded, tiny, train

pytestmark = pytest.mark.usefixtures("shared_programs")
TWO_STAGES = {
    **{"depths": (1, 1), "patch_sizes": (7, 3), "strides": (4, 2), "padding": (2, 1)},
    **{"position_embeddings": (False,) * 2, "residual_scale_init_values": (None, 1.0), "drop_path_rate": 0.2},
}
RANDFORMER = FreshNetwork.from_variant(
    "randformer_s12", **TWO_STAGES, hidden_sizes=(8, 16), token_mixers=("identity", "random"), image_size=16
)
CAFORMER = FreshNetwork.from_variant(
    "caformer_s18",
    **TWO_STAGES,
    hidden_sizes=(8, 32),
    token_mixers=("sep_conv", "attention"),
    head_dropout_rate=0.4,
)
FOUR_STAGES = {
    "depths": (1, 1, 1, 1),
    "hidden_sizes": (8, 16, 32, 64),
    "patch_sizes": (7, 3, 3, 3),
    "strides": (4, 2, 2, 2),
    "padding": (2, 1, 1, 1),
    "token_mixers": ("sep_conv", "sep_conv", "attention", "attention"),
    "position_embeddings": (False,) * 4,
    "residual_scale_init_values": (None, None, 1.0, 1.0),
}


def small(run_dir, **changes):
    return tiny(run_dir, mesh=sharded(8, 1), save_every=1000, **changes)


def fingerprints(run_dir, step):
    return read_record(epath.Path(run_dir / "checkpoints"), step)["fingerprints"]


def named(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }


@pytest.mark.parametrize("variant", ["randformer_s12", "caformer_s18"])
def test_a_new_network_starts_with_the_authors_values(variant):
    # Not those of the first paper, whose convolutions keep PyTorch's default.
    network = FreshNetwork.from_variant(variant, depths=(1,) * 4, hidden_sizes=(32,) * 4, num_labels=100)
    for parameter in all_parameters(network):
        values, name = np.asarray(initial_value(jax.random.key(0), parameter)), parameter.path.rpartition("/")[2]
        if parameter.path.endswith("random/kernel"):
            np.testing.assert_allclose(values.sum(0), np.ones(len(values)), rtol=1e-5)
            assert 0.5 < values.min() * len(values) < values.max() * len(values) < 2
        elif name == "kernel":
            np.testing.assert_allclose([1 + values.mean(), values.std()], [1, 0.02], rtol=0.1, err_msg=parameter.path)
        else:
            np.testing.assert_array_equal(values, {"scale": 1, "bias": 0}[name], err_msg=parameter.path)


@pytest.mark.parametrize("network", [RANDFORMER, CAFORMER])
def test_only_kernels_decay(network):
    network = dataclasses.replace(network, num_labels=10)
    decaying = {name for name, decays in named(decay_mask(random_variables(network)[1]["params"])).items() if decays}
    mixers = {
        RANDFORMER.token_mixers: (),
        CAFORMER.token_mixers: (
            *(f"stages_0/blocks_0/token_mixer/{layer}/kernel" for layer in ("pwconv1", "dwconv", "pwconv2")),
            *(f"stages_1/blocks_0/token_mixer/{layer}/kernel" for layer in ("qkv", "proj")),
        ),
    }
    head = ("head/kernel",) if network.head == "linear" else ("head/fc1/kernel", "head/fc2/kernel")
    mlps = {f"stages_{stage}/blocks_0/mlp/{layer}/kernel" for stage in (0, 1) for layer in ("fc1", "fc2")}
    convolutions = ("stem/conv/kernel", "stages_1/downsample/conv/kernel")
    assert decaying == {*convolutions, *mlps, *mixers[network.token_mixers], *head}


def test_layer_decay_takes_the_norms_around_a_convolution_and_the_mlp_head_along():
    scales = named(layer_scales(random_variables(dataclasses.replace(CAFORMER, num_labels=10))[1]["params"], 0.5))
    expected = {
        "stem/norm/scale": 1 / 8,
        "stages_0/blocks_0/token_mixer/act1/bias": 1 / 4,
        "stages_1/downsample/norm/scale": 1 / 2,
        "stages_1/blocks_0/residual_scale_2/scale": 1 / 2,
        "norm/scale": 1.0,
        "head/fc1/kernel": 1.0,
        "head/norm/bias": 1.0,
    }
    assert {name: scales[name] for name in expected} == expected


def test_head_dropout_is_between_the_norm_and_the_last_layer_of_the_head():
    # With the identity as the last layer, the logits are what dropout returns.
    network = dataclasses.replace(CAFORMER, num_labels=4 * 32, drop_path_rate=0.0, head_dropout_rate=0.5)
    model, variables = MetaFormerForImageClassification(network), random_variables(network)[1]
    head = variables["params"]["head"] | {"fc2": {"kernel": jnp.eye(128), "bias": jnp.zeros(128)}}
    variables = {"params": variables["params"] | {"head": head}}
    pixels = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)
    kept = jax.jit(model.apply)(variables, pixels).logits
    train = jax.jit(lambda v, x: model.apply(v, x, train=True, rngs={"dropout": jax.random.key(0)}))
    dropped = train(variables, pixels).logits
    assert 0.3 < np.mean(dropped == 0) < 0.7
    np.testing.assert_allclose(dropped, np.where(dropped == 0, 0, 2 * kept), rtol=1e-5)


def test_steps_leave_random_matrices_as_they_are_and_nothing_is_kept_of_their_gradients():
    config = tiny(model=RANDFORMER, mesh=sharded(1, 1), optimizer__weight_decay=0.5, optimizer__name="lamb")
    first = first_state(config)
    (matrix,) = jax.tree.leaves(first.constants)
    np.testing.assert_allclose(matrix.sum(0), np.ones(4), rtol=1e-6)
    state, _ = train(config, 2, jax.devices()[:1])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.constants), first.constants)
    assert not any("random" in name for tree in (state.params, state.ema, state.optimizer) for name in named(tree))
    assert not np.array_equal(state.params["head"]["kernel"], first.params["head"]["kernel"])


@pytest.mark.parametrize("layout", ["jax", "sail"])
def test_fine_tuning_starts_with_the_saved_weights_and_a_new_last_layer(tmp_path, layout):
    config = dataclasses.replace(CAFORMER, **FOUR_STAGES, num_labels=7)
    model, saved = MetaFormerForImageClassification(config), random_variables(config)[1]
    save_pretrained(tmp_path / "model", model, saved, layout=layout)
    source = next((tmp_path / "model").glob("*.pth.tar"), tmp_path / "model")
    wanted = PretrainedNetwork(str(source), drop_path_rate=0.3, head_dropout_rate=0.25)
    network = make_network(tiny(model=wanted, data=DataConfig()), ("ant", "bee", "cat"))
    found = network.model.config
    assert (found.head, found.num_labels, found.head_dropout_rate, found.drop_path_rate) == ("mlp", 3, 0.25, 0.3)
    before, after = (named(tree["params"]) for tree in (saved, network.argument()))
    new = {name for name in before if not np.array_equal(before[name], after[name])}
    assert new == {"head/fc2/kernel", "head/fc2/bias"}


@pytest.mark.slow  # compiles a separate training step
def test_random_matrices_pass_through_checkpoints_and_into_the_saved_models(tmp_path):
    config = small(tmp_path / "run", model=RANDFORMER, max_steps=5)
    _, parts = open_and_make_parts(config)
    (matrix,) = jax.tree.leaves(jax.device_get(parts.init(parts.network.argument()).constants))
    run(dataclasses.replace(config, max_steps=2))
    outcome = run(config)
    assert "constants/stages_1/blocks_0/token_mixer/random/kernel" in fingerprints(tmp_path / "run", 5)
    run(dataclasses.replace(config, run_dir=tmp_path / "whole"))
    assert fingerprints(tmp_path / "whole", 5) == fingerprints(tmp_path / "run", 5)
    for folder, weights in (("model", "params"), ("model-ema", "ema")):
        _, variables = load_pretrained(tmp_path / "run" / folder)
        (found,) = jax.tree.leaves(variables["constants"])
        np.testing.assert_array_equal(found, matrix)
        with evaluation_batches(config.data, open_source(config.data, "validation")) as batches:
            alone = evaluate(parts.evaluation_step, {"saved": variables}, batches, parts.mesh)["saved"]
        assert alone.loss == pytest.approx(outcome.evaluations[weights].loss, rel=1e-5)


@pytest.mark.slow  # compiles two separate training steps
def test_a_caformer_is_trained_with_lamb_and_fine_tuned_with_layer_decay(tmp_path):
    config = small(tmp_path / "run", model=CAFORMER, optimizer__name="lamb", optimizer__ema_warmup=True)
    levels = {finding.subject: finding.level for finding in examine(config)}
    assert "failure" not in levels.values()
    run(dataclasses.replace(config, max_steps=3))
    wanted = PretrainedNetwork(str(tmp_path / "run" / "model-ema"), keep_head=True, head_dropout_rate=0.25)
    tuning = small(tmp_path / "tuned", model=wanted, max_steps=3, optimizer__layer_decay=0.75)
    assert run(tuning).evaluations.keys() == {"params", "ema"}
    tuned = load_pretrained(tmp_path / "tuned" / "model")[0].config
    assert (tuned.head, tuned.head_dropout_rate, tuned.token_mixers) == ("mlp", 0.25, CAFORMER.token_mixers)


@pytest.mark.slow  # compiles a training step
def test_a_recipe_trains_a_small_network_of_its_kind(tmp_path):
    recipe = RECIPES["imagenet-poolformerv2_s12"].config
    small_layers = {"depths": (1,) * 4, "hidden_sizes": (8, 16, 32, 64)}
    images = {"source": "synthetic", "image_size": 64, "batch_size": 16, "synthetic_examples": 32, "workers": 0}
    config = dataclasses.replace(
        recipe,
        run_dir=tmp_path,
        model=dataclasses.replace(recipe.model, **small_layers),
        data=dataclasses.replace(recipe.data, **images, mix=dataclasses.replace(recipe.data.mix, mix_group=16)),
        distributed=ALONE,
        max_steps=2,
    )
    assert np.isfinite(run(config).evaluations["params"].loss)

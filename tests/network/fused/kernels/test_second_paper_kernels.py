"""The TPU kernels for ConvFormer and CAFormer compute what XLA does: depthwise convolutions, MLPs, norms, attention.

Pallas interprets the kernels here, and lowers them as for a TPU.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from poolformer_jax import GpuKernels, PoolFormerForImageClassification, TpuKernels
from poolformer_jax.network import kernel_stages
from poolformer_jax.network.functional import depthwise_convolution
from poolformer_jax.network.fused import (
    MlpWeights,
    NormDenseWeights,
    choose_kernels,
    convolve_depthwise,
    dense_residual,
    layer_norm_and_input,
    norm_dense,
    norm_mlp_residual,
)
from poolformer_jax.network.fused.kernels import choice, tpu_attention, tpu_depthwise, tpu_rows, verification
from poolformer_jax.network.fused.self_attention import attend_heads
from small_networks import TWO_STAGE_CAFORMER, distance, random_variables

INTERPRETED = TpuKernels(interpret=True)
slow = partial(pytest.param, marks=pytest.mark.slow)


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def value_and_gradients(function, dy, *arguments):
    @jax.jit
    def run(*arguments):
        y, vjp = jax.vjp(function, *arguments)
        return y, vjp(jax.tree.map(lambda dy, y: dy.astype(y.dtype), dy, y))

    return run(*arguments)


def assert_as_near_to_float32_as_xla(run, rounding=0.0):
    """Compares `run(kernels, dtype)`, a tree of arrays, with kernels and without, both in bfloat16, to float32's."""
    found, plain, exact = run(INTERPRETED, jnp.bfloat16), run(None, jnp.bfloat16), run(None, jnp.float32)
    for (path, one), two, three in zip(jax.tree.leaves_with_path(found), *map(jax.tree.leaves, (plain, exact))):
        if np.any(three):
            assert distance(one, three) < max(1.1 * distance(two, three), rounding), jax.tree_util.keystr(path)
        else:
            assert not np.any(one), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("shape", "size", "tile_rows"), [((16, 3, 9, 128), 3, 1), slow((32, 6, 9, 192), 7, 3), slow((16, 2, 3, 128), 7, 2)]
)
def test_depthwise_kernels_compute_the_convolution_and_its_gradients(shape, size, tile_rows, monkeypatch):
    monkeypatch.setattr(tpu_depthwise, "_TILE_BYTES", tile_rows * shape[2] * 16 * 128 * 2)
    jax.clear_caches()
    x, kernel, dy = normal(*shape, dtype=jnp.bfloat16), normal(size, size, 1, shape[3]), normal(*shape, seed=1)
    dy = dy.astype(jnp.bfloat16).astype(jnp.float32)
    found = value_and_gradients(partial(convolve_depthwise, kernels=INTERPRETED), dy, x, kernel)
    exact = value_and_gradients(depthwise_convolution, dy, x.astype(jnp.float32), kernel)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(exact)):
        assert distance(one, other) < 2**-9  # the rounding of the results to bfloat16


@pytest.mark.parametrize("shape", [(16, 2, 3, 64), slow((32, 3, 5, 96))])
def test_mlp_kernels_are_as_near_to_float32_as_xla(shape, monkeypatch):
    monkeypatch.setattr(tpu_rows, "_HIDDEN_NUMBERS", 32 * 2 * shape[3])  # several tiles
    channels, hidden = shape[3], 2 * shape[3]
    weights = MlpWeights(
        normal(channels, hidden) / channels**0.5,
        normal(hidden),
        normal(hidden, channels) / hidden**0.5,
        normal(channels),
    )
    parameters = normal(channels, seed=1), weights
    keep = jnp.asarray(np.arange(shape[0]) % 3 * 0.75, jnp.float32)

    def run(kernels, dtype):
        x, dy = (normal(*shape, seed=seed, dtype=jnp.bfloat16).astype(dtype) for seed in (2, 3))
        return value_and_gradients(partial(norm_mlp_residual, kernels, 1e-6), dy, x + 1, keep, parameters)

    assert_as_near_to_float32_as_xla(run, rounding=3e-3)


@pytest.mark.parametrize("shape", [(16, 2, 3, 64), slow((32, 3, 5, 96))])
def test_kernels_for_the_start_of_a_sep_conv_mixer_are_as_near_to_float32_as_xla(shape, monkeypatch):
    monkeypatch.setattr(tpu_rows, "_HIDDEN_NUMBERS", 32 * 2 * shape[3])  # several tiles
    channels, hidden = shape[3], 2 * shape[3]
    vectors = (normal(hidden, seed=seed) for seed in range(3))
    weights = NormDenseWeights(normal(channels, hidden) / channels**0.5, *vectors)

    def run(kernels, dtype):
        x, dtrunk = (normal(*shape, seed=seed, dtype=jnp.bfloat16).astype(dtype) for seed in (2, 3))
        dhidden = normal(*shape[:3], hidden, dtype=jnp.bfloat16).astype(dtype)
        return value_and_gradients(partial(norm_dense, kernels, 1e-6), (dhidden, dtrunk), x + 1, weights)

    assert_as_near_to_float32_as_xla(run, rounding=3e-3)


@pytest.mark.parametrize("shape", [(16, 2, 3, 64), slow((32, 3, 5, 96))])
def test_kernels_for_the_end_of_a_sep_conv_mixer_are_as_near_to_float32_as_xla(shape):
    channels, hidden_size = shape[3], 2 * shape[3]
    parameters = normal(hidden_size, channels) / hidden_size**0.5, normal(channels)
    keep = jnp.asarray(np.arange(shape[0]) % 3 * 0.75, jnp.float32)

    def run(kernels, dtype):
        x, dy = (normal(*shape, seed=seed, dtype=jnp.bfloat16).astype(dtype) for seed in (2, 3))
        hidden = normal(*shape[:3], hidden_size, dtype=jnp.bfloat16).astype(dtype)
        return value_and_gradients(partial(dense_residual, kernels), dy, x, hidden, keep, parameters)

    assert_as_near_to_float32_as_xla(run, rounding=3e-3)


@pytest.mark.parametrize("shape", [(16, 2, 3, 64), slow((32, 3, 5, 96))])
def test_layer_norm_kernels_are_as_near_to_float32_as_xla(shape):
    parameters = normal(shape[3]), normal(shape[3], seed=1)

    def run(kernels, dtype):
        x, dy, dtrunk = (normal(*shape, seed=seed, dtype=jnp.bfloat16).astype(dtype) for seed in (2, 3, 4))
        function = partial(layer_norm_and_input, kernels, 1e-6)
        return value_and_gradients(function, (dy, dtrunk), x + 1, parameters)

    assert_as_near_to_float32_as_xla(run, rounding=3e-3)


@pytest.mark.parametrize("shape", [(16, 2, 16, 9), slow((32, 6, 32, 130))])
def test_attention_kernels_are_as_near_to_float32_as_xla(shape, monkeypatch):
    monkeypatch.setattr(choice, "_FEWEST_POSITIONS", 1)
    monkeypatch.setattr(tpu_attention, "_SCORES", shape[1] // 2 * shape[3] ** 2)  # two tiles for each image

    def run(kernels, dtype):
        *heads, dy = (normal(*shape, seed=seed, dtype=jnp.bfloat16).astype(dtype) for seed in range(4))
        return value_and_gradients(partial(attend_heads, kernels), dy, *heads)

    assert_as_near_to_float32_as_xla(run)


PIXELS = np.random.default_rng(0).standard_normal((16, 16, 16, 3), np.float32)


def test_blocks_of_a_caformer_use_their_kernels_on_a_tpu(monkeypatch):
    monkeypatch.setattr(choice, "_FEWEST_POSITIONS", 1)
    shapes = jax.eval_shape(PoolFormerForImageClassification(TWO_STAGE_CAFORMER).init, jax.random.key(0), PIXELS)

    def loss(variables):
        model = PoolFormerForImageClassification(TWO_STAGE_CAFORMER, dtype=jnp.bfloat16, kernels=TpuKernels())
        return model.apply(variables, PIXELS, jnp.zeros(16, int)).loss

    program = jax.export.export(jax.jit(jax.grad(loss)), platforms=["tpu"])(shapes).mlir_module()
    # Two MLPs, a sep_conv mixer in three passes, an attention, and three other norms; each forward and backward.
    assert program.count("tpu_custom_call") == 2 * (2 + 3 + 1 + 3)


@pytest.mark.slow
def test_gradients_of_a_network_are_as_near_to_float32_as_the_plain_blocks(monkeypatch):
    monkeypatch.setattr(choice, "_FEWEST_POSITIONS", 1)
    _, variables = random_variables(TWO_STAGE_CAFORMER)

    def gradient(kernels, dtype, fused=True):
        model = PoolFormerForImageClassification(TWO_STAGE_CAFORMER, dtype=dtype, kernels=kernels, fused=fused)

        def loss(variables):
            rngs = {"dropout": jax.random.key(0)}
            return model.apply(variables, PIXELS, jnp.arange(16) % 7, train=True, rngs=rngs).loss

        assert ("pallas_call" in str(jax.make_jaxpr(jax.grad(loss))(variables))) == (kernels is not None)
        return jax.jit(jax.grad(loss))(variables)

    exact, plain = gradient(None, jnp.float32, fused=False), gradient(None, jnp.bfloat16, fused=False)
    assert distance(gradient(INTERPRETED, jnp.bfloat16), exact) < 1.1 * distance(plain, exact)


def test_the_passes_of_every_stage_of_a_caformer_are_compared(monkeypatch):
    monkeypatch.setattr(choice, "_FEWEST_POSITIONS", 1)
    compared = {}

    def record(name, kernels, inputs):
        compared[name] = [one.x.shape[1:] for one in inputs]
        return np.zeros(len(inputs))

    monkeypatch.setattr(verification, "_compiled_differences", lambda platform: record)
    monkeypatch.setattr(verification, "kernels_for", lambda mesh, batch_axes: TpuKernels(mesh, batch_axes))
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))
    stages = kernel_stages(TWO_STAGE_CAFORMER, (16, 16), train=True)
    kernels, _ = choose_kernels("auto", mesh, ("data",), jnp.bfloat16, stages, gradients=True)
    assert kernels is not None
    of_first_stage, of_second_stage = [(4, 4, 64)], [(2, 2, 64)]
    of_both_stages = of_first_stage + of_second_stage
    assert compared == {
        "norm_dense": of_first_stage,
        "norm_dense_gradient": of_first_stage,
        "depthwise_convolution": of_first_stage,
        "depthwise_gradient": of_first_stage,
        "dense_residual": of_first_stage,
        "dense_residual_gradient": of_first_stage,
        "norm_mlp_residual": of_both_stages,
        "norm_mlp_gradient": of_both_stages,
        "layer_norm": of_both_stages,
        "layer_norm_gradient": of_both_stages,
        "attention": of_second_stage,
        "attention_gradient": of_second_stage,
    }


def test_a_gpu_without_kernels_for_a_network_leaves_it_to_xla(monkeypatch):
    """Otherwise inference would compute the network as trained instead of the folded one."""
    monkeypatch.setattr(verification, "kernels_for", lambda mesh, batch_axes: GpuKernels(mesh, batch_axes))
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))
    stages = kernel_stages(TWO_STAGE_CAFORMER, (16, 16), train=False)
    assert choose_kernels("auto", mesh, ("data",), jnp.bfloat16, stages, gradients=False) == (None, None)

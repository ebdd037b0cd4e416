"""With explicit mesh axes and inside `shard_map`, loss and gradients are those of one device."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from poolformer_jax import PoolFormerForImageClassification
from poolformer_jax.network.fused import cpu_batching
from poolformer_jax.network.fused.kernels import GpuKernels, TpuKernels
from small_networks import TWO_STAGES, distance, random_variables

# The second stage saves its hidden layer.
WIDE = dataclasses.replace(
    TWO_STAGES, depths=(1, 1), hidden_sizes=(8, cpu_batching.SAVE_HIDDEN_CHANNELS), drop_path_rate=0.4
)
ONE_STAGE = dataclasses.replace(
    WIDE,
    depths=(1,),
    hidden_sizes=(64,),
    mlp_ratio=1.0,
    patch_sizes=(7,),
    strides=(4,),
    padding=(2,),
    token_mixers=("pooling",),
    position_embeddings=(False,),
)
PIXELS = np.random.default_rng(0).normal(size=(8, 24, 32, 3)).astype(np.float32)
LABELS = np.arange(len(PIXELS)) % WIDE.num_labels


def mesh_of(shape, *axis_types):
    return jax.make_mesh(shape, ("data", "model"), axis_types=axis_types, devices=jax.devices()[: np.prod(shape)])


def loss(variables, pixels, labels, config=WIDE, train=False, **options):
    model = PoolFormerForImageClassification(config, **options)
    return model.apply(variables, pixels, labels, train=train, rngs={"dropout": jax.random.key(7)}).loss


@pytest.fixture(scope="module", autouse=True)
def microbatches():
    """Every device computes its images in microbatches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_batching, "MICROBATCH_BYTES", 2**12)
        yield


@pytest.fixture(scope="module")
def variables():
    return random_variables(WIDE)[1]


def assert_close(found, exact, relative):
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=relative * np.abs(theirs).max())


@pytest.fixture(scope="module")
def of_one_device(variables):
    """Loss and gradients of a training step without a mesh, by parameters and pixels."""
    return training_step()(variables, PIXELS, LABELS)


def training_step():
    return jax.jit(jax.value_and_grad(partial(loss, train=True, remat=True), argnums=(0, 1)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axis_types", "batch_axes"),
    [
        ((AxisType.Explicit, AxisType.Explicit), ("data", "model")),
        pytest.param((AxisType.Explicit, AxisType.Auto), "data", marks=pytest.mark.slow),
    ],
)
def test_along_explicit_axes(axis_types, batch_axes, variables, of_one_device):
    step = training_step()
    with jax.set_mesh(mesh_of((2, 2), *axis_types)):
        pixels, labels = jax.device_put((PIXELS, LABELS), P(batch_axes))
        found = step(jax.device_put(variables, P()), pixels, labels)
        value, (gradients, of_pixels) = found
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves((value, gradients)))
        assert jax.typeof(of_pixels) == jax.typeof(pixels)
    assert_close(found, of_one_device, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)])
def test_inside_shard_map(axis_type):
    variables = random_variables(ONE_STAGE)[1]
    mesh = mesh_of((4, 1), axis_type, AxisType.Auto)
    # Not GELU: inside shard_map jax 0.12.0 has no gradient of erf.
    step = jax.value_and_grad(partial(loss, config=dataclasses.replace(ONE_STAGE, hidden_act="silu")))

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P(), axis_names={"data"})
    def shared(*arguments):
        value, gradients = step(*arguments)  # the gradients are sums over the devices
        return jax.lax.pmean(value, "data"), jax.tree.map(lambda total: total / 4, gradients)

    with jax.set_mesh(mesh):
        arguments = jax.device_put(variables, P()), *jax.device_put((PIXELS, LABELS), P("data"))
        found = jax.jit(shared)(*arguments)
    assert_close(found, jax.jit(step)(variables, PIXELS, LABELS), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [TpuKernels, GpuKernels])
def test_kernels_along_explicit_axes(kernels):
    pixels, labels = np.tile(PIXELS, (4, 1, 1, 1)), np.tile(LABELS, 4)  # kernels take 16 images per device
    variables = random_variables(ONE_STAGE)[1]
    found = []
    for axis_type in (AxisType.Explicit, AxisType.Auto):
        mesh = mesh_of((2, 1), axis_type, axis_type)
        options = {"dtype": jnp.bfloat16, "kernels": kernels(mesh, ("data",), interpret=True)}
        step = jax.jit(jax.value_and_grad(partial(loss, config=ONE_STAGE, **options)))
        with jax.set_mesh(mesh):
            arguments = jax.device_put(variables, P()), *jax.device_put((pixels, labels), P("data"))
            assert "pallas_call" in str(jax.make_jaxpr(step)(*arguments))
            found.append(step(*arguments))
    assert distance(*found) < 0.01  # rounded in bfloat16, elsewhere

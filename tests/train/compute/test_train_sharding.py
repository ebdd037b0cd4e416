"""A run computes the same on any mesh of devices."""

import dataclasses
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from poolformer_jax.compilation import TRAINING_ON_CPU
from poolformer_jax.errors import InputError
from train import setup
from train.compute.sharding import check_batch, make_mesh, state_shardings
from train.config import MeshConfig
from training import NETWORK, ONE_STAGE, open_and_make_parts, sharded, tiny, train

STEPS = 4
two_stages = partial(tiny, model=NETWORK)


@pytest.fixture(scope="module", autouse=True)
def usual_code_generator():
    """With XLA's older one, which compiles the other tests, norms of gradients on eight devices differ by 1e-9."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TRAINING_ON_CPU, "xla_cpu_use_fusion_emitters", True)
        yield


def losses(config, devices=None):
    _, rows = train(config, STEPS, devices)
    return np.array([[row["loss"], row["gradient_norm"]] for row in rows])


@pytest.fixture(scope="module")
def float32_losses_of_one_device():
    return losses(tiny(mesh=sharded(1, 1)), jax.devices()[:1])


@pytest.fixture(scope="module")
def float64_losses_of_one_device():
    with jax.enable_x64(True):
        return losses(two_stages(mesh=sharded(1, 1), dtype="float64"), jax.devices()[:1])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(4, 2), (8, 1), (1, 8)])
def test_any_mesh_gives_the_losses_of_one_device_in_float64(mesh, float64_losses_of_one_device):
    with jax.enable_x64(True):
        found = losses(two_stages(mesh=sharded(*mesh), dtype="float64"))
    np.testing.assert_allclose(found, float64_losses_of_one_device, rtol=1e-12)


@pytest.mark.slow
def test_a_mesh_gives_the_losses_of_one_device_in_float32(float32_losses_of_one_device):
    # Sums over eight devices round differently: about ten units in the last place of float32 after four steps.
    np.testing.assert_allclose(losses(tiny(mesh=sharded(4, 2))), float32_losses_of_one_device, rtol=2e-6)


@pytest.mark.slow
def test_a_batch_in_parts_with_rematerialised_stages_gives_the_losses_of_the_whole():
    # Without drop path, because each part draws other random numbers.
    with jax.enable_x64(True):
        plain = tiny(mesh=sharded(2, 1), dtype="float64", model=dataclasses.replace(ONE_STAGE, drop_path_rate=0.0))
        in_parts = dataclasses.replace(plain, remat=True, optimizer=dataclasses.replace(plain.optimizer, accumulate=4))
        two = jax.devices()[:2]
        np.testing.assert_allclose(losses(in_parts, two), losses(plain, two), rtol=1e-12)


@pytest.mark.slow
def test_bfloat16_stays_close_and_keeps_float32_weights(float32_losses_of_one_device):
    state, rows = train(tiny(mesh=sharded(1, 1), dtype="bfloat16"), STEPS, jax.devices()[:1])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}
    # bfloat16 has 8 bits, so a relative rounding error of 2^-9 for each operation.
    np.testing.assert_allclose([row["loss"] for row in rows], float32_losses_of_one_device[:, 0], rtol=1e-2)


@dataclass(frozen=True)
class Chip:
    id: int
    slice_index: int
    platform = "cpu"
    device_kind = ""

    @property
    def process_index(self):
        return self.slice_index


def test_fsdp_stays_inside_a_slice_and_data_goes_over_the_slices():
    """Two slices of four chips, listed alternately."""
    devices = [Chip(id=n, slice_index=n % 2) for n in range(8)]
    for fsdp, slices in ((1, [[0]] * 4 + [[1]] * 4), (4, [[0] * 4, [1] * 4]), (8, [[0] * 4 + [1] * 4])):
        mesh = make_mesh(MeshConfig(fsdp=fsdp), devices)
        assert [[device.slice_index for device in row] for row in mesh.devices] == slices


def test_the_largest_divisible_axis_is_sharded_and_small_arrays_are_replicated():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    shapes = {
        "wide": jax.ShapeDtypeStruct((64, 256), np.float32),
        "odd": jax.ShapeDtypeStruct((258, 64), np.float32),
        "indivisible": jax.ShapeDtypeStruct((1001, 333), np.float32),
        "small": jax.ShapeDtypeStruct((64,), np.float32),
        "scalar": jax.ShapeDtypeStruct((), np.int32),
    }
    found = {name: sharding.spec for name, sharding in state_shardings(mesh, shapes, min_size=1000).items()}
    assert found == {
        "wide": PartitionSpec(None, "fsdp"),
        "odd": PartitionSpec(None, "fsdp"),
        "indivisible": PartitionSpec(),
        "small": PartitionSpec(),
        "scalar": PartitionSpec(),
    }


def test_fsdp_keeps_a_share_of_weights_and_moments_on_every_device():
    _, parts = open_and_make_parts(two_stages(mesh=sharded(1, 8)))
    state = parts.init(parts.network.argument())
    kernel = state.params["stages_1"]["blocks_0"]["mlp"]["fc1"]["kernel"]
    moment = state.optimizer[0].mu["stages_1"]["blocks_0"]["mlp"]["fc1"]["kernel"]
    assert kernel.shape == (16, 64)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(16, 8)}
    assert {shard.data.shape for shard in moment.addressable_shards} == {(16, 8)}


def test_devices_that_cannot_be_arranged_are_refused():
    with pytest.raises(ValueError, match=r"mesh.data=3 and mesh.fsdp=2 do not arrange the 8 devices"):
        make_mesh(MeshConfig(data=3, fsdp=2))


def test_a_batch_that_devices_cannot_share_is_refused_with_sizes_that_work():
    mesh = make_mesh(MeshConfig())
    check_batch(mesh, 64, accumulate=4)
    with pytest.raises(ValueError, match=r"data.batch_size=100 .* multiple of 32: 96 or 128"):
        check_batch(mesh, 100, accumulate=4)


def test_a_state_that_a_device_cannot_hold_is_refused(monkeypatch):
    on_each, divided = (open_and_make_parts(tiny(mesh=sharded(*mesh)))[1] for mesh in ((8, 1), (1, 8)))
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(on_each.abstract_state))
    monkeypatch.setattr(setup, "free_memory", lambda: 8 * needed)
    setup.check_memory(on_each)
    monkeypatch.setattr(setup, "free_memory", lambda: 8 * needed - 1)
    with pytest.raises(InputError, match=r"on each device, .* Expected a smaller network, or a larger --mesh\.fsdp"):
        setup.check_memory(on_each)
    setup.check_memory(divided)

"""One image sharded over devices by height: the same maps and logits, with a share of the memory on each device."""

import jax
import numpy as np
import pytest

from poolformer_jax import PoolFormerConfig
from poolformer_jax.inference.height_sharded import HeightShardedModel
from small_networks import FAMILY, TINY, random_variables

CONFIG = PoolFormerConfig(**TINY)


@pytest.fixture(scope="module")
def variables():
    return random_variables(CONFIG)


@pytest.fixture(scope="module")
def four(variables):
    return HeightShardedModel(CONFIG, variables[1], devices=jax.local_devices()[:4])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "convformer", pytest.param("poolformerv2", marks=pytest.mark.slow)])
def test_four_devices_compute_what_the_model_computes_on_one(kind, variables, four):
    model, params = variables
    if kind is not None:
        model, params = random_variables(FAMILY[kind])
        four = HeightShardedModel(FAMILY[kind], params, devices=jax.local_devices()[:4])
    pixels = np.random.default_rng(0).standard_normal((1, 256, 128, 3)).astype(np.float32)
    expected = jax.jit(model.apply)(params, pixels)
    output = four(pixels)
    np.testing.assert_allclose(output.logits, expected.logits, rtol=0, atol=1e-5 * np.abs(expected.logits).max())
    for ours, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
        # Includes the rows on both sides of the borders between bands.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_a_mesh_that_the_caller_has_set_changes_nothing(four):
    pixels = np.random.default_rng(0).standard_normal((1, 256, 64, 3)).astype(np.float32)
    expected, plan = four(pixels).logits, four.memory_per_device(256, 64)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])):
        np.testing.assert_array_equal(four(pixels).logits, expected)
        assert four.memory_per_device(256, 64) == plan


def test_every_device_holds_its_band_of_rows(four):
    output = four(np.zeros((1, 256, 128, 3), np.float32))
    for state, stride in zip(output.hidden_states, (4, 8, 16, 32)):
        bands = {shard.device: shard.data.shape[1] for shard in state.addressable_shards}
        assert bands == dict.fromkeys(jax.local_devices()[:4], 256 // stride // 4)


def test_every_device_needs_a_share_of_the_memory(variables, four):
    one = HeightShardedModel(CONFIG, variables[1], devices=jax.local_devices()[:1])
    alone, shared = one.memory_per_device(512, 512), four.memory_per_device(512, 512)
    # A quarter, and halo rows. Gathering one whole map would take as much again.
    assert shared.temporaries < alone.temporaries / 4 * 1.2
    assert shared.results < alone.results / 4 * 1.1
    assert "MiB per device" in str(shared)


def test_a_height_with_unequal_bands_is_refused_with_the_next_one_that_works(four):
    with pytest.raises(ValueError, match=r"1000 pixels high.*multiple of 128.*resize it to 1024"):
        four(np.zeros((1, 1000, 64, 3), np.float32))


def test_pixels_in_nchw_are_refused_for_their_layout_not_their_height(four):
    with pytest.raises(ValueError, match=r"PyTorch's NCHW: use pixel_values.transpose\(0, 2, 3, 1\)"):
        four(np.zeros((1, 3, 128, 64), np.float32))


def test_no_devices_are_refused(variables):
    with pytest.raises(ValueError, match="devices is empty"):
        HeightShardedModel(CONFIG, variables[1], devices=[])


def test_an_integer_dtype_is_refused(variables):
    with pytest.raises(ValueError, match="dtype='int8': expected float32 or bfloat16"):
        HeightShardedModel(CONFIG, variables[1], dtype="int8")


def test_a_network_whose_maps_have_unequal_bands_at_every_height_is_refused():
    config = PoolFormerConfig(**TINY, padding=(0, 0, 0, 0))
    with pytest.raises(
        ValueError, match=r"of 128 pixels are \(31, 15, 7, 3\) pixels high, which cannot be divided equally"
    ):
        HeightShardedModel(config, random_variables(config)[1], devices=jax.local_devices()[:4])


@pytest.mark.parametrize(("kind", "mixer"), [("caformer", "attention"), ("randformer", "random")])
def test_mixers_that_need_every_position_are_refused_on_several_devices(kind, mixer):
    with pytest.raises(ValueError, match=rf"mixer {mixer} reads every position .* Expected one device"):
        HeightShardedModel(FAMILY[kind], random_variables(FAMILY[kind])[1], devices=jax.local_devices()[:4])

"""Several CPU devices compute what one does: a batch, each its own images, and one image, all of them together."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from poolformer_jax import PoolFormerConfig
from poolformer_jax.cpu_devices import data_parallel, tensor_parallel
from poolformer_jax.folding import fold, folded_apply
from small_networks import EVERY_MIXER, TINY, random_variables

SHALLOW = PoolFormerConfig(**{**TINY, "depths": (1, 1, 1, 1)})


def mesh(devices):
    return Mesh(np.asarray(jax.devices()[:devices]), ("batch",))


def random_pixels(batch, size):
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, size, size, 3)), jnp.float32)


def exchanges(compiled):
    """The kinds of exchange between devices in a compiled program."""
    return set(re.findall(r"\b(all-gather|all-reduce|all-to-all|collective-\w+|reduce-scatter)\(", compiled.as_text()))


def shared(config, devices):
    """The network on one image, on so many devices, and its parameters there."""
    folded = fold(config, random_variables(config)[1])
    return tensor_parallel(partial(folded_apply, config, axis="batch"), folded, mesh(devices))


def test_each_device_works_through_its_own_images_in_parts():
    folded, pixels, devices = fold(SHALLOW, random_variables(SHALLOW)[1]), random_pixels(16, 32), mesh(4)
    apply = data_parallel(partial(folded_apply, SHALLOW, images_at_once=2), devices)
    cut = jax.device_put(pixels, NamedSharding(devices, P("batch")))
    compiled = jax.jit(apply).lower(jax.device_put(folded, NamedSharding(devices, P())), cut).compile()
    assert "while" in compiled.as_text()
    assert not exchanges(compiled)
    whole = folded_apply(SHALLOW, folded, pixels)
    np.testing.assert_allclose(jax.jit(apply)(folded, cut), whole, rtol=0, atol=1e-6 * np.abs(whole).max())


@pytest.mark.parametrize("norm", ["group_norm", "layer_norm"])
@pytest.mark.parametrize("batch", [1, 3])
def test_an_image_that_devices_share_has_the_logits_it_has_on_one(norm, batch):
    positions = (False, False, True, False)
    config = PoolFormerConfig(**TINY, token_mixers=EVERY_MIXER, norm=norm, position_embeddings=positions, image_size=64)
    pixels, (apply, params) = random_pixels(batch, 64), shared(config, 4)
    whole = jax.jit(folded_apply, static_argnums=0)(config, fold(config, random_variables(config)[1]), pixels)
    np.testing.assert_allclose(jax.jit(apply)(params, pixels), whole, rtol=0, atol=1e-5 * np.abs(whole).max())


def test_devices_that_share_an_image_meet_once_a_block_and_once_a_convolution():
    config = PoolFormerConfig(**TINY)
    apply, params = shared(config, 2)
    compiled = jax.jit(apply).lower(params, random_pixels(1, 64)).compile()
    text = compiled.as_text()
    assert exchanges(compiled) == {"all-gather", "all-reduce"}
    assert len(re.findall(r"all-reduce\(", text)) == sum(config.depths)
    assert len(re.findall(r"all-gather\(", text)) == len(config.depths)


def test_devices_that_share_an_image_hold_a_part_of_the_large_parameters():
    _, params = shared(SHALLOW, 4)
    parts = [
        (leaf.shape, leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(params)
        if leaf.size > SHALLOW.num_labels * SHALLOW.hidden_sizes[-1]
    ]
    assert len(parts) == 12  # four convolutions, and two layers in each of four blocks
    assert all(4 * np.prod(part) == np.prod(whole) for whole, part in parts)


@pytest.mark.parametrize(("devices", "can"), [(1, False), (2, True), (3, False), (8, True)])
def test_as_many_devices_share_an_image_as_divide_the_networks_widths(devices, can):
    assert (shared(SHALLOW, devices) is not None) is can

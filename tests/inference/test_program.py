"""How the compiled network shares a batch among devices."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from poolformer_jax.inference.folding import fold
from poolformer_jax.inference.jax_operations import folded_apply
from poolformer_jax.inference.program import shard_on_cpu
from small_networks import TWO_STAGES, random_variables


def mesh(devices):
    return Mesh(np.asarray(jax.devices()[:devices]), ("batch",))


def random_pixels(batch, size):
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, size, size, 3)), jnp.float32)


def exchanges(compiled):
    """The kinds of exchange between devices in a compiled program."""
    return set(re.findall(r"\b(all-gather|all-reduce|all-to-all|collective-\w+|reduce-scatter)\(", compiled.as_text()))


def test_each_cpu_device_computes_its_own_images_in_parts():
    folded, pixels, devices = fold(TWO_STAGES, random_variables(TWO_STAGES)[1]), random_pixels(16, 32), mesh(4)
    apply = shard_on_cpu(partial(folded_apply, TWO_STAGES, images_at_once=2), devices)
    cut = jax.device_put(pixels, NamedSharding(devices, P("batch")))
    compiled = jax.jit(apply).lower(jax.device_put(folded, NamedSharding(devices, P())), cut).compile()
    assert "while" in compiled.as_text()
    assert not exchanges(compiled)
    whole = folded_apply(TWO_STAGES, folded, pixels)
    np.testing.assert_allclose(jax.jit(apply)(folded, cut), whole, rtol=0, atol=1e-6 * np.abs(whole).max())

"""A block of the second paper computes the same in microbatches, as a CPU does, as the paper writes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poolformer_jax.network.block import MetaFormerBlock
from poolformer_jax.network.fused import cpu_batching
from small_networks import FAMILY


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        ("caformer", 2),  # attention, with residual scales
        pytest.param("caformer", 0, marks=pytest.mark.slow),  # separable convolutions
        pytest.param("poolformerv2", 3, marks=pytest.mark.slow),  # pooling with residual scales
        pytest.param("identityformer", 0, marks=pytest.mark.slow),
    ],
)
def test_a_block_in_microbatches_has_the_value_and_gradients_of_the_plain_block(monkeypatch, kind, stage):
    config, rng = FAMILY[kind], np.random.default_rng(0)
    channels = config.hidden_sizes[stage]
    with jax.enable_x64():
        x = jnp.asarray(rng.standard_normal((4, 3, 4, channels)))
        monkeypatch.setattr(cpu_batching, "MICROBATCH_BYTES", 2 * x[0].nbytes)
        fused, plain = (MetaFormerBlock(config, stage, 0.5, fused=fused) for fused in (True, False))
        variables = jax.eval_shape(lambda: plain.init(jax.random.key(0), x, None, False))
        variables = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)), variables)

        def loss(block, variables, x):
            y, _ = block.apply(variables, x, None, True, rngs={"dropout": jax.random.key(1)})
            return jnp.sum(jnp.sin(y))

        found = jax.value_and_grad(loss, argnums=(1, 2))
        assert "scan" in str(jax.make_jaxpr(found, static_argnums=0)(fused, variables, x))
        fast, exact = (jax.jit(found, static_argnums=0)(block, variables, x) for block in (fused, plain))
    for one, other in zip(jax.tree.leaves(fast), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-9 * float(np.abs(other).max()))

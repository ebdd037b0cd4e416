"""The folded network as StableHLO, the format of `jax.export`."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jaxtyping import Array, Float32

from poolformer_jax.images import PoolFormerImageProcessor
from poolformer_jax.inference import Parameters, folded_apply, normalized
from poolformer_jax.network import PoolFormerConfig, probabilities as to_probabilities

PLATFORMS = ("cpu", "cuda", "tpu")


def to_stablehlo(
    config: PoolFormerConfig,
    folded: Parameters,
    image_size: tuple[int, int],
    dtype: Dtype = jnp.float32,
    *,
    normalization: PoolFormerImageProcessor | None = None,
    probabilities: bool = False,
) -> bytes:
    """What `jax.export.deserialize` reads: the network for every one of `PLATFORMS`, with a symbolic batch.

    jax promises that its versions of the next six months read it, and runtimes that are three weeks older.

    The options are those of `export_model`; `folded` is what `fold` returns. Raises ValueError for an image size that
    the network does not take; ImportError without flatbuffers.
    """
    (batch,) = jax.export.symbolic_shape("batch")
    pixels = jax.ShapeDtypeStruct(
        (batch, *image_size, config.num_channels), jnp.float32 if normalization is None else jnp.uint8
    )

    def network(x: Array) -> Array | tuple[Array, Array]:
        x = x if normalization is None else normalized(normalization, x)
        logits = folded_apply(config, folded, x, dtype=dtype)
        return (logits, to_probabilities(config, logits)) if probabilities else logits

    with jax.set_mesh(None):  # the caller's mesh is no part of the network
        return bytes(jax.export.export(jax.jit(network), platforms=PLATFORMS)(pixels).serialize())


def run_stablehlo(data: bytes, pixel_values: np.ndarray) -> Float32[np.ndarray, "b labels"]:
    """The logits that the exported network computes here."""
    with jax.set_mesh(None):
        outputs = jax.export.deserialize(bytearray(data)).call(pixel_values)
    return np.asarray(outputs[0] if isinstance(outputs, tuple | list) else outputs)

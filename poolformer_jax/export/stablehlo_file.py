"""The folded network as StableHLO, the format of `jax.export`."""

from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jaxtyping import Float32

from poolformer_jax.inference import Parameters, folded_apply
from poolformer_jax.network import PoolFormerConfig

PLATFORMS = ("cpu", "cuda", "tpu")


def to_stablehlo(
    config: PoolFormerConfig, folded: Parameters, image_size: tuple[int, int], dtype: Dtype = jnp.float32
) -> bytes:
    """What `jax.export.deserialize` reads: the network for every one of `PLATFORMS`, with a symbolic batch.

    jax promises that its versions of the next six months read it, and runtimes that are three weeks older.

    Args:
        config: the architecture.
        folded: what `fold` returns.
        image_size: height and width of the input in pixels.
        dtype: type that feature maps are computed in.

    Raises:
        ValueError: for an image size that the network does not take.
        ImportError: without flatbuffers.
    """
    (batch,) = jax.export.symbolic_shape("batch")
    pixels = jax.ShapeDtypeStruct((batch, *image_size, config.num_channels), jnp.float32)
    network = jax.jit(partial(folded_apply, config, folded, dtype=dtype))
    return bytes(jax.export.export(network, platforms=PLATFORMS)(pixels).serialize())


def run_stablehlo(data: bytes, pixel_values: Float32[np.ndarray, "b h w c"]) -> Float32[np.ndarray, "b labels"]:
    """The logits that the exported network computes here."""
    return np.asarray(jax.export.deserialize(bytearray(data)).call(pixel_values))

"""ZeroModels: the first paper's networks in Keras 3, on JAX."""

from pathlib import Path

import jax
import keras
import numpy as np
import zeromodels
from safetensors.numpy import load_file

from benchmarks.workload import Workload, read_pixels
from poolformer_jax import load_pretrained
from poolformer_jax.resources import available_cores


def inference(folder: str) -> Workload:
    """Logits of a batch, compiled by `jax.jit`. The environment variable KERAS_BACKEND must be "jax".

    ZeroModels averages before the last norm, as timm does, so it gets timm's weights. Its logits are compared here with
    those of our network in this order, and not with the other implementations' logits.
    """
    pixels, weights = read_pixels(folder), Path(folder) / "timm"
    ours, variables = load_pretrained(weights)
    config = ours.config
    keras.config.set_image_data_format("channels_last")
    network = zeromodels.models.poolformer.PoolFormerImageClassify(
        embed_dim=config.hidden_sizes,
        depths=config.depths,
        image_size=pixels.shape[1:],
        num_classes=config.num_labels,
    )
    network.transfer_from_timm(network, load_file(weights / "model.safetensors"))
    values = [
        [variable.value for variable in group]
        for group in (network.trainable_variables, network.non_trainable_variables)
    ]

    @jax.jit
    def logits(values: list[list[jax.Array]], x: jax.Array) -> jax.Array:
        return network.stateless_call(*values, x, training=False)[0]

    images = jax.numpy.asarray(pixels)

    def call() -> jax.Array:
        return jax.block_until_ready(logits(values, images))

    result, expected = np.asarray(call()), np.asarray(jax.jit(ours.apply)(variables, images).logits)
    if not np.abs(result - expected).max() <= 1e-4 * np.abs(expected).max():
        raise SystemExit("ZeroModels computes other logits than our network with the same weights.")
    return Workload(call, result, {"zeromodels": zeromodels.__version__, "keras": keras.__version__}, available_cores())

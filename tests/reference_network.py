"""A second PoolFormer, in forty lines over sail's names, with every known mistake as a switch.

Only tests use it: without a mistake it agrees with the golden arrays, and each mistake moves the logits further than
the parity tests allow. So the golden arrays would catch these mistakes in any implementation.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

MISTAKES = (
    "SAME padding in the stem",
    "SAME padding in the downsampling",
    "padding counted in the pooling mean",
    "pooling without subtracting its input",
    "32 groups",
    "epsilon 1e-6",
    "LayerNorm for GroupNorm",
    "tanh GELU",
    "average before the norm",
    "layer scale left out",
    "softmax in the model",
)


def logits(state: Mapping[str, jax.Array], pixel_values: jax.Array, mistake: str | None = None) -> jax.Array:
    """[b, h, w, 3] -> [b, labels] for the weights of one of sail's s12 ... m48."""

    def conv(x, name, stride, padding, same):
        pad = "SAME" if mistake == same else [(padding, padding)] * 2
        kernel = state[f"{name}.weight"].transpose(2, 3, 1, 0)
        out = lax.conv_general_dilated(x, kernel, (stride, stride), pad, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return out + state[f"{name}.bias"]

    def norm(x, name):
        groups = 32 if mistake == "32 groups" else 1
        axes = (3,) if mistake == "LayerNorm for GroupNorm" else (1, 2, 4)
        grouped = x if axes == (3,) else x.reshape(*x.shape[:3], groups, -1)
        centred = grouped - grouped.mean(axes, keepdims=True)
        epsilon = 1e-6 if mistake == "epsilon 1e-6" else 1e-5
        standard = centred / jnp.sqrt(jnp.square(centred).mean(axes, keepdims=True) + epsilon)
        return standard.reshape(x.shape) * state[f"{name}.weight"] + state[f"{name}.bias"]

    def window_sum(x):
        return lax.reduce_window(x, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), ((0, 0), (1, 1), (1, 1), (0, 0)))

    def pool(x):
        count = 9.0 if mistake == "padding counted in the pooling mean" else window_sum(jnp.ones_like(x[:1, :, :, :1]))
        mean = window_sum(x) / count
        return mean if mistake == "pooling without subtracting its input" else mean - x

    def dense(x, name):
        weight = state[f"{name}.weight"]
        return x @ weight.reshape(weight.shape[:2]).T + state[f"{name}.bias"]

    def scale(name):
        return 1.0 if mistake == "layer scale left out" else state[name]

    x = conv(pixel_values, "patch_embed.proj", 4, 2, "SAME padding in the stem")
    for index in range(7):
        if index % 2:
            x = conv(x, f"network.{index}.proj", 2, 1, "SAME padding in the downsampling")
            continue
        block = 0
        while f"network.{index}.{block}.norm1.weight" in state:
            name = f"network.{index}.{block}"
            x = x + scale(f"{name}.layer_scale_1") * pool(norm(x, f"{name}.norm1"))
            hidden = jax.nn.gelu(dense(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"), approximate=mistake == "tanh GELU")
            x = x + scale(f"{name}.layer_scale_2") * dense(hidden, f"{name}.mlp.fc2")
            block += 1
    x = norm(x.mean((1, 2), keepdims=True) if mistake == "average before the norm" else x, "norm")
    out = dense(x.mean((1, 2)), "head")
    return jax.nn.softmax(out) if mistake == "softmax in the model" else out

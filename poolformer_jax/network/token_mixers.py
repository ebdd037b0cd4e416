"""What a block mixes tokens with. A new mixer is one class here, one entry in `TOKEN_MIXERS`, and its name in `config`.

The paper's claim is that this choice matters little; these are the choices its Table 5 compares.
Source: arXiv 2111.11418, Section 4.3; sail-sg/poolformer, models/metaformer.py.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from poolformer_jax.errors import InputError
from poolformer_jax.network import functional
from poolformer_jax.network.config import PoolFormerConfig
from poolformer_jax.network.layers import KERNEL_INIT


class TokenMixer(Protocol):
    """Anything that maps a feature map to one of the same shape, communicating between positions."""

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]: ...


class Pooling(nn.Module):
    """Average pooling minus its input: PoolFormer's mixer, without a parameter."""

    pool_size: int = 3

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return functional.pooling_mixer(x, self.pool_size)


class Identity(nn.Module):
    """No communication between positions at all."""

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return x


class Attention(nn.Module):
    """Multi-head self-attention over all positions, heads of 32 channels, no bias in the query, key and value."""

    head_dim: int = 32
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        batch, height, width, channels = x.shape
        if channels % self.head_dim:
            raise InputError(
                f"Attention splits channels into heads of {self.head_dim}, and this stage has {channels} channels. "
                f"Expected a multiple of {self.head_dim} in hidden_sizes."
            )
        qkv = nn.Dense(3 * channels, use_bias=False, kernel_init=KERNEL_INIT, dtype=self.dtype, name="qkv")(x)
        # [b, h, w, 3 * c] -> three of [b, h * w, heads, head_dim]
        heads = channels // self.head_dim
        query, key, value = jnp.moveaxis(qkv.reshape(batch, height * width, 3, heads, self.head_dim), 2, 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query * self.head_dim**-0.5, key)
        weights = jax.nn.softmax(functional.widen(scores)).astype(x.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
        return nn.Dense(channels, kernel_init=KERNEL_INIT, dtype=self.dtype, name="proj")(mixed)


class SpatialFc(nn.Module):
    """One dense layer over all positions, shared by the channels and without a bias; it fixes the input's size."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        batch, height, width, channels = x.shape
        # [b, h, w, c] -> [b, c, h * w] and back
        tokens = x.reshape(batch, height * width, channels).swapaxes(1, 2)
        dense = nn.Dense(height * width, use_bias=False, kernel_init=KERNEL_INIT, dtype=self.dtype, name="fc")
        return dense(tokens).swapaxes(1, 2).reshape(x.shape)


# How the model builds each mixer. `name` is the parameter tree's name for it.
TOKEN_MIXERS: Mapping[str, Callable[[PoolFormerConfig, Dtype, str], TokenMixer]] = {
    "pooling": lambda config, dtype, name: Pooling(config.pool_size, name=name),
    "identity": lambda config, dtype, name: Identity(name=name),
    "attention": lambda config, dtype, name: Attention(dtype=dtype, name=name),
    "spatial_fc": lambda config, dtype, name: SpatialFc(dtype=dtype, name=name),
}

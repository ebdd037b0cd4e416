"""The parts a block is built from, with their parameters and how these start.

Initial values follow the authors (sail-sg/poolformer, models/poolformer.py): a normal distribution of 0.02 in the MLP
and the head, PyTorch's own default for the patch convolutions.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jax.nn import initializers
from jaxtyping import Array, Float, PRNGKeyArray

from poolformer_jax.network import functional
from poolformer_jax.network.fused import patch_convolution

# The authors truncate at ±2 in absolute terms, a hundred standard deviations away: a plain normal distribution.
# `initializers.truncated_normal` would cut at ±2 standard deviations instead.
KERNEL_INIT: Initializer = initializers.normal(0.02)


class PatchEmbedding(nn.Module):
    """Convolution that makes the feature map smaller: the stem, and the start of every later stage.

    The padding is explicit, because JAX's "SAME" pads on other sides. Kernel and bias start as PyTorch's default does:
    uniform within 1 / sqrt(fan_in).
    """

    features: int
    patch_size: int
    stride: int
    padding: int
    dtype: Dtype = jnp.float32
    own_gradient: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 features"]:
        shape = (self.patch_size, self.patch_size, x.shape[-1], self.features)
        kernel, bias = _ConvParameters(shape, name="conv")()
        convolve = patch_convolution.convolve if self.own_gradient else patch_convolution.convolve_plainly
        return convolve(x.astype(self.dtype), kernel, bias, self.stride, self.padding)


class _ConvParameters(nn.Module):
    shape: tuple[int, int, int, int]

    @nn.compact
    def __call__(self) -> tuple[Float[Array, "kh kw c d"], Float[Array, " d"]]:
        init = _uniform_within(1 / math.sqrt(math.prod(self.shape[:3])))
        kernel: Float[Array, "kh kw c d"] = self.param("kernel", init, self.shape, jnp.float32)
        bias: Float[Array, " d"] = self.param("bias", init, self.shape[3:], jnp.float32)
        return kernel, bias


def _uniform_within(bound: float) -> Initializer:
    def init(key: PRNGKeyArray, shape: Sequence[int], dtype: Dtype = jnp.float32, **_: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class GroupNorm(nn.Module):
    """Normalisation of each image over height, width and channels. Flax's own defaults to 32 groups and 1e-6."""

    @nn.compact
    def parameters(self, features: int) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
        """Scale and bias alone, for computations that take several layers at once."""
        return _scale_and_bias(self, features)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return functional.group_norm(x, *self.parameters(x.shape[-1]))


class LayerNorm(nn.Module):
    """Normalisation of each position over its channels."""

    epsilon: float = functional.EPSILON

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        return functional.layer_norm(x, *_scale_and_bias(self, x.shape[-1]), self.epsilon)


def _scale_and_bias(module: nn.Module, features: int) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    scale = module.param("scale", initializers.ones, (features,), jnp.float32)
    bias = module.param("bias", initializers.zeros, (features,), jnp.float32)
    return scale, bias


class LayerScale(nn.Module):
    """A learnt factor per channel on a residual branch (arXiv 2103.17239)."""

    init_value: float

    @nn.compact
    def parameters(self, features: int) -> Float[Array, " c"]:
        """The factors alone, for computations that take several layers at once."""
        init = initializers.constant(self.init_value)
        factors: Float[Array, " c"] = self.param("scale", init, (features,), jnp.float32)
        return factors

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        return x * functional.over_channels(self.parameters(x.shape[-1]), x)


class DropPath(nn.Module):
    """Stochastic depth on a residual branch; does nothing outside training. Draws from the "dropout" stream."""

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "b ..."], train: bool) -> Float[Array, "b ..."]:
        if not train or self.rate == 0:
            return x
        return functional.drop_path(self.make_rng("dropout"), x, self.rate)


class Mlp(nn.Module):
    """Two dense layers on the channels of each position; the authors write them as 1x1 convolutions."""

    hidden_features: int
    activation: Callable[[Array], Array]
    dropout_rate: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
        dropout = nn.Dropout(self.dropout_rate, deterministic=not train)
        hidden = nn.Dense(self.hidden_features, kernel_init=KERNEL_INIT, dtype=self.dtype, name="fc1")(x)
        hidden = dropout(self.activation(hidden))
        fc2 = nn.Dense(x.shape[-1], kernel_init=KERNEL_INIT, dtype=self.dtype, name="fc2")
        out: Float[Array, "b h w c"] = dropout(fc2(hidden))
        return out


class MlpParameters(nn.Module):
    """The kernels and biases of an `Mlp`, for computations that take several layers at once."""

    hidden_features: int

    @nn.compact
    def __call__(
        self, features: int
    ) -> tuple[Float[Array, "c hidden"], Float[Array, " hidden"], Float[Array, "hidden c"], Float[Array, " c"]]:
        kernel1, bias1 = _DenseParameters(features, self.hidden_features, name="fc1")()
        kernel2, bias2 = _DenseParameters(self.hidden_features, features, name="fc2")()
        return kernel1, bias1, kernel2, bias2


class _DenseParameters(nn.Module):
    inputs: int
    outputs: int

    @nn.compact
    def __call__(self) -> tuple[Float[Array, "inputs outputs"], Float[Array, " outputs"]]:
        shape = (self.inputs, self.outputs)
        kernel: Float[Array, "inputs outputs"] = self.param("kernel", KERNEL_INIT, shape, jnp.float32)
        bias: Float[Array, " outputs"] = self.param("bias", initializers.zeros, shape[1:], jnp.float32)
        return kernel, bias

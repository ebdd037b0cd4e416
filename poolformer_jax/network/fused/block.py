"""A PoolFormer block's two residual branches, each in as few passes over the feature map as the algebra allows.

They compute what `MetaFormerBlock` computes with group norm and pooling, for accelerators, where reading and writing
feature maps takes most of a block's time:

1. `pool(norm(x)) - norm(x) = gain * (pool(x) - x) / std`: the branch needs one number of norm1 per image, and never
   writes a normalised map. The mean of a constant is the constant, so norm1's mean and shift cancel.
2. Vectors over channels are multiplied into the matrices beforehand: norm2's gain and shift into the first, layer scale
   into the second. Their gradients follow from the matrices' by the chain rule, in float32 and without a feature map.
3. A branch sums the mean and variance of its output while it computes it, and returns them with the map (`Moments`).
   One pass is enough because the sums are taken around a value known beforehand, the mean of the branch's input:
   `E[d²] - E[d]²` cancels only if a branch moves the mean of an image by many standard deviations.
4. The backward pass saves only each branch's input and output. It recomputes the MLP's hidden layer, which costs less
   than writing and reading it; a CPU saves it where there are many channels.

Each of the four passes (two branches, forward and backward) is written once for XLA. A CPU runs it on a few images at a
time (`cpu_batching`); a TPU runs it with pixels grouped to fill its lanes (`tpu_layout`), or as a Pallas kernel
(`kernels`).

Both branches are functions of the map and of its moments, with a gradient for each. Together these give the gradient of
the norm, to any order. The branches have no forward-mode derivative (`jax.jvp`); `MetaFormerBlock` has one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from poolformer_jax.network.functional import gelu, over_channels, widen
from poolformer_jax.network.fused import cpu_batching, tpu_layout
from poolformer_jax.network.fused.dispatch import run_pass
from poolformer_jax.network.fused.kernels.base import POOL_SIZE, Kernels
from poolformer_jax.network.fused.sharding_types import match_varying_axes, partition_spec, with_auto_sharding
from poolformer_jax.network.fused.statistics import (
    Moments,
    add_moments_gradient,
    broadcast_over_map,
    shifted_moments,
    standardize,
    standardize_gradient_of_moments,
)

__all__ = ["MlpWeights", "fold_mlp", "mlp_residual", "pooling_residual"]

_Map = Float[Array, "b h w c"]
_Hidden = Float[Array, "b _h _w _hidden"]
_PerImage = Float[Array, " b"]
_PerChannel = Float[Array, " c"]
_Activation = Callable[[Array], Array]

# The inputs of a pass for each image. Forward: the branch's input, its moments and drop path's factor. Backward: also
# the branch's output, the output's moments, and the gradients of these two.
_Inputs = tuple[_Map, Moments, _PerImage]
_Gradients = tuple[_Map, Moments, _PerImage, _Map, Moments, _Map, Moments]


class MlpWeights(NamedTuple):
    """Two dense layers with norm2 and layer scale folded in; float32, like all parameters.

    `kernel1 [c, hidden]` and `bias1 [hidden]` take standardised maps, without gain and shift.
    """

    kernel1: Float[Array, "c hidden"]
    bias1: Float[Array, " hidden"]
    kernel2: Float[Array, "hidden c"]
    bias2: Float[Array, " c"]


# What the forward passes save: inputs, outputs, and the hidden layer before its activation or an empty tuple.
_PoolingResiduals = tuple[_Inputs, _PerChannel, tuple[_Map, Moments]]
_MlpResiduals = tuple[_Inputs, MlpWeights, tuple[_Map, Moments], tuple[_Hidden, ...]]


def fold_mlp(
    gain: Float[Array, " c"],
    shift: Float[Array, " c"],
    kernel1: Float[Array, "c hidden"],
    bias1: Float[Array, " hidden"],
    kernel2: Float[Array, "hidden c"],
    bias2: Float[Array, " c"],
    scale: Float[Array, " c"],
    *,
    dtype: Dtype,
) -> MlpWeights:
    """Folds norm2's gain and shift and the layer scale into the two layers, in `dtype`."""
    gain, shift, kernel1, bias1, kernel2, bias2, scale = (
        jnp.asarray(parameter, dtype) for parameter in (gain, shift, kernel1, bias1, kernel2, bias2, scale)
    )
    return MlpWeights(gain[:, None] * kernel1, shift @ kernel1 + bias1, kernel2 * scale[None], bias2 * scale)


def pooling_residual(
    pool_size: int,
    x: _Map,
    x_moments: Moments,
    gain: _PerChannel,
    keep: _PerImage,
    kernels: Kernels | None = None,
) -> tuple[_Map, Moments]:
    """`x + keep * gain * (pool(x) - x) / std(x)`, and its moments.

    Args:
        pool_size: the window's side in pixels; odd.
        x: feature maps.
        x_moments: their moments.
        gain: norm1's gain times the layer scale.
        keep: drop path's factor for each image, 1 without drop path; a constant without a gradient.
        kernels: compute the passes that they support, on their platform.
    """
    branch = partial(_pooling_branch, pool_size, kernels)
    return with_auto_sharding(branch, x, x_moments, gain, keep, specs=_specs(x))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _pooling_branch(
    pool_size: int, kernels: Kernels | None, x: _Map, x_moments: Moments, gain: _PerChannel, keep: _PerImage
) -> tuple[_Map, Moments]:
    compute = partial(_xla_pooling_residual, pool_size)
    result: tuple[_Map, Moments]
    result, _ = run_pass(
        kernels if pool_size == POOL_SIZE else None, "pooling_residual", compute, (x, x_moments, keep), gain
    )
    return result


def _xla_pooling_residual(
    pool_size: int, pixels: int, inputs: _Inputs, gain: _PerChannel
) -> tuple[tuple[_Map, Moments], tuple[()]]:
    x, x_moments, keep = inputs
    x, gain = tpu_layout.group_pixels(x, pixels), tpu_layout.tile_channels(gain, pixels)
    # In float32, because `pool(x) - x` cancels digits. Only the result is rounded.
    branch = tpu_layout.pooling_mixer(pixels, x, pool_size) * _scale(gain, x_moments.inverse_std * keep)
    y = (widen(x) + branch).astype(x.dtype)
    return (tpu_layout.ungroup_pixels(y, pixels), shifted_moments(x_moments.mean, y)), ()


def _pooling_forward(
    pool_size: int, kernels: Kernels | None, x: _Map, x_moments: Moments, gain: _PerChannel, keep: _PerImage
) -> tuple[tuple[_Map, Moments], _PoolingResiduals]:
    result = _pooling_branch(pool_size, kernels, x, x_moments, gain, keep)
    return result, ((x, x_moments, keep), gain, result)


def pooling_gradient(
    pool_size: int, kernels: Kernels | None, residuals: _PoolingResiduals, cotangents: tuple[_Map, Moments]
) -> tuple[_Map, Moments, _PerChannel, _PerImage]:
    inputs, gain, outputs = residuals
    compute = partial(_xla_pooling_gradient, pool_size)
    (dx, dvariance), dgain = run_pass(
        kernels if pool_size == POOL_SIZE else None, "pooling_gradient", compute, (*inputs, *outputs, *cotangents), gain
    )
    zeros = jnp.zeros_like(dvariance)
    return dx, Moments(zeros, dvariance), dgain, zeros


def _xla_pooling_gradient(
    pool_size: int, pixels: int, gradients: _Gradients, gain: _PerChannel
) -> tuple[tuple[_Map, _PerImage], _PerChannel]:
    x, x_moments, keep, y, y_moments, dy, dmoments = gradients
    x, y, dy = (tpu_layout.group_pixels(z, pixels) for z in (x, y, dy))
    dy = add_moments_gradient(y, y_moments, dy, dmoments)
    # Gain, std and keep are constant over an image, so the window slides only over dy. dx and both scalar gradients use
    # the result.
    mixed = tpu_layout.pooling_mixer_transpose(pixels, dy, pool_size)
    inverse_std = x_moments.inverse_std
    scale = _scale(tpu_layout.tile_channels(gain, pixels), inverse_std * keep)
    dx = (widen(dy) + widen(mixed) * scale).astype(x.dtype)
    per_channel = tpu_layout.sum_pixels(jnp.sum(widen(x) * widen(mixed), (1, 2)), pixels) * keep[:, None]
    return (
        tpu_layout.ungroup_pixels(dx, pixels),
        -0.5 * inverse_std**3 * (per_channel @ gain),
    ), inverse_std @ per_channel


_pooling_branch.defvjp(_pooling_forward, pooling_gradient)


def mlp_residual(
    activation: _Activation,
    x: _Map,
    x_moments: Moments,
    weights: MlpWeights,
    keep: _PerImage,
    kernels: Kernels | None = None,
) -> tuple[_Map, Moments]:
    """`x + keep * mlp((x - mean(x)) / std(x))`, and its moments.

    Args:
        activation: of the hidden layer, elementwise.
        x: feature maps.
        x_moments: their moments.
        weights: the two layers with norm2 and the layer scale folded in.
        keep: drop path's factor for each image, 1 without drop path; a constant without a gradient.
        kernels: compute the passes that they support, on their platform.
    """
    branch = partial(_mlp_branch, activation, kernels)
    return with_auto_sharding(branch, x, x_moments, weights, keep, specs=_specs(x))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mlp_branch(
    activation: _Activation,
    kernels: Kernels | None,
    x: _Map,
    x_moments: Moments,
    weights: MlpWeights,
    keep: _PerImage,
) -> tuple[_Map, Moments]:
    compute = partial(_xla_mlp_residual, activation)
    result: tuple[_Map, Moments]
    result, _ = run_pass(
        kernels if activation is gelu else None,
        "mlp_residual",
        compute,
        (x, x_moments, keep),
        weights,
        hidden_features=len(weights.bias1),
    )
    return result


def _xla_mlp_residual(
    activation: _Activation, pixels: int, inputs: _Inputs, weights: MlpWeights
) -> tuple[tuple[_Map, Moments], tuple[()]]:
    (result, _), sums = _xla_mlp_residual_and_hidden(activation, pixels, inputs, weights)
    return result, sums


def _xla_mlp_residual_and_hidden(
    activation: _Activation, pixels: int, inputs: _Inputs, weights: MlpWeights
) -> tuple[tuple[tuple[_Map, Moments], _Hidden], tuple[()]]:
    x, x_moments, keep = inputs
    x, weights = tpu_layout.group_pixels(x, pixels), _cast(weights, x.dtype)
    standard = standardize(x, x_moments)
    inner = _dense(pixels, standard, weights.kernel1, weights.bias1)
    branch = _dense(pixels, activation(inner), weights.kernel2, weights.bias2)
    y = x + branch * broadcast_over_map(keep).astype(x.dtype)
    return ((tpu_layout.ungroup_pixels(y, pixels), shifted_moments(x_moments.mean, y)), inner), ()


def _mlp_forward(
    activation: _Activation,
    kernels: Kernels | None,
    x: _Map,
    x_moments: Moments,
    weights: MlpWeights,
    keep: _PerImage,
) -> tuple[tuple[_Map, Moments], _MlpResiduals]:
    inputs = (x, x_moments, keep)
    if not cpu_batching.saves_hidden_layer(x) or (kernels is not None and kernels.interpret):
        result = _mlp_branch(activation, kernels, x, x_moments, weights, keep)
        return result, (inputs, weights, result, ())

    def on_cpu(inputs: _Inputs, weights: MlpWeights) -> tuple[tuple[_Map, Moments], _Hidden]:
        compute = partial(_xla_mlp_residual_and_hidden, activation, 1)
        results, _ = cpu_batching.microbatched(lambda images: compute(images, weights), inputs)
        return results

    def on_others(inputs: _Inputs, weights: MlpWeights) -> tuple[tuple[_Map, Moments], _Hidden]:
        x, x_moments, keep = inputs
        # All platforms must return the same arrays. Nothing uses these zeros, and compilers remove them.
        unused = jnp.zeros((*x.shape[:3], len(weights.bias1)), x.dtype)
        return match_varying_axes((_mlp_branch(activation, kernels, x, x_moments, weights, keep), unused))

    result, inner = lax.platform_dependent(inputs, weights, cpu=on_cpu, default=on_others)
    return result, (inputs, weights, result, (inner,))


def mlp_gradient(
    activation: _Activation,
    kernels: Kernels | None,
    residuals: _MlpResiduals,
    cotangents: tuple[_Map, Moments],
) -> tuple[_Map, Moments, MlpWeights, _PerImage]:
    inputs, weights, outputs, inner = residuals
    batched = (*inputs, *outputs, *cotangents)
    (dx, dmoments), dweights = run_pass(
        kernels if activation is gelu else None,
        "mlp_gradient",
        partial(_xla_mlp_gradient, activation),
        batched,
        weights,
        hidden_features=len(weights.bias1),
        saved=inner,
        # XLA fuses nothing with a GPU's matrix products. Without the checkpoint it would write and read what the
        # activation shares with its derivative, a float32 array of the hidden layer's size.
        on_gpu=partial(_xla_mlp_gradient, jax.checkpoint(activation)),
    )
    return dx, dmoments, MlpWeights(*dweights), jnp.zeros_like(inputs[2])


def _xla_mlp_gradient(
    activation: _Activation, pixels: int, gradients: tuple[Any, ...], weights: MlpWeights
) -> tuple[tuple[_Map, Moments], tuple[Array, ...]]:
    x, x_moments, keep, y, y_moments, dy, dmoments, *saved = gradients
    x, y, dy = (tpu_layout.group_pixels(z, pixels) for z in (x, y, dy))
    dy = add_moments_gradient(y, y_moments, dy, dmoments)
    cast = _cast(weights, x.dtype)
    standard = standardize(x, x_moments)
    (inner,) = saved or (_dense(pixels, standard, cast.kernel1, cast.bias1),)
    hidden, activation_vjp = jax.vjp(activation, inner)

    dbranch = dy * broadcast_over_map(keep).astype(dy.dtype)
    (dinner,) = activation_vjp(tpu_layout.dense(pixels, dbranch, cast.kernel2.T))
    inner_sums = tpu_layout.sum_pixels(jnp.sum(widen(dinner), (1, 2)), pixels)
    product_sums = tpu_layout.sum_pixels(jnp.sum(widen(dinner) * widen(inner), (1, 2)), pixels)
    dweights = (
        tpu_layout.dense_gradient(pixels, standard, dinner),
        jnp.sum(inner_sums, 0),
        tpu_layout.dense_gradient(pixels, hidden, dbranch),
        tpu_layout.sum_pixels(jnp.sum(widen(dbranch), (0, 1, 2)), pixels),
    )
    # The gradient of `standard = (x - mean) * inverse_std` by x, mean and variance. The last two are sums of dstandard
    # over the map. Sums over the hidden layer give them too, without another pass over the map:
    # sum(dstandard) = sum(dinner) @ kernel1.T, and standard @ kernel1 = inner - bias1.
    dstandard = widen(tpu_layout.dense(pixels, dinner, cast.kernel1.T))
    dx = (widen(dy) + dstandard * broadcast_over_map(x_moments.inverse_std)).astype(dy.dtype)
    total = inner_sums @ jnp.sum(widen(cast.kernel1), 0)
    products = jnp.sum(product_sums, 1) - inner_sums @ widen(cast.bias1)
    return (
        tpu_layout.ungroup_pixels(dx, pixels),
        standardize_gradient_of_moments(x_moments, total, products),
    ), dweights


_mlp_branch.defvjp(_mlp_forward, mlp_gradient)


def _dense(
    pixels: int, x: Float[Array, "b h w2 c2"], kernel: Float[Array, "c d"], bias: Float[Array, " d"]
) -> Float[Array, "b h w2 d2"]:
    """A dense layer on each pixel of a group."""
    y = tpu_layout.dense(pixels, x, kernel)
    return y + over_channels(tpu_layout.tile_channels(bias, pixels), y)


def _specs(x: _Map) -> tuple[PartitionSpec, PartitionSpec]:
    """How a branch's results are sharded: maps like its input, moments like the batch."""
    spec = partition_spec(x)
    return PartitionSpec(*spec), PartitionSpec(spec[0])


def _cast(weights: MlpWeights, dtype: Dtype) -> MlpWeights:
    return MlpWeights(*(weight.astype(dtype) for weight in weights))


def _scale(gain: _PerChannel, per_image: _PerImage) -> Float[Array, "b 1 1 c"]:
    return (per_image[:, None] * gain[None])[:, None, None, :]

"""A PoolFormer block's two residual branches, each in as few passes over the feature map as the algebra allows.

The same function as `MetaFormerBlock` with group norm and pooling, written for accelerators, where a block is bounded
by how often it reads and writes its feature map, not by its arithmetic:

1. `pool(norm(x)) - norm(x) = gain * (pool(x) - x) / std`: the branch needs one number of norm1 per image, and no
   normalised map is ever written. The mean of a constant is the constant, so norm1's mean and shift cancel.
2. Vectors over channels go into the matrices beforehand: norm2's gain and shift into the first, layer scale into the
   second. Their gradients follow from the matrices' by the chain rule, in float32 and without touching a feature map.
3. The mean and variance of what a branch returns are summed where it is computed, and travel with it (`Moments`).
   One pass is enough for that because the sums are taken around a value known beforehand, the mean of the branch's
   input: `E[d²] - E[d]²` cancels only where a branch moves the mean of an image by many standard deviations.
4. The backward pass keeps each branch's input and output, nothing else. It computes the MLP's hidden layer again,
   which costs less than writing it and reading it back; but not on a CPU, where there are many channels.

Each of the four passes, two branches forward and backward, is written once for XLA. A CPU works through it a few images
at a time (`caches`), a TPU with pixels grouped to fill its lanes (`lanes`) or by a Pallas kernel (`kernels`).

Both branches are functions of the map AND of its moments, and give a gradient for each: together the chain rule of the
norm, to any order. There is no forward-mode derivative (`jax.jvp`); `MetaFormerBlock` has one.
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
from poolformer_jax.network.fused.kernels import POOL_SIZE, Kernels, Pass
from poolformer_jax.network.fused.mesh_types import on_any_mesh, spec_of, vary_alike
from poolformer_jax.network.fused.statistics import (
    Moments,
    around,
    over_map,
    standardize_with,
    through,
    through_standardized,
)

__all__ = ["MlpWeights", "fold_mlp", "mlp_residual", "pooling_residual"]

_Map = Float[Array, "b h w c"]
_Hidden = Float[Array, "b _h _w _hidden"]
_PerImage = Float[Array, " b"]
_PerChannel = Float[Array, " c"]
_Activation = Callable[[Array], Array]

# What a pass needs of every image: a branch's input, its moments and drop path's factor; backward also its output, the
# output's moments, and the gradients of these two.
_Inputs = tuple[_Map, Moments, _PerImage]
_Gradients = tuple[_Map, Moments, _PerImage, _Map, Moments, _Map, Moments]


class MlpWeights(NamedTuple):
    """Two dense layers with everything around them folded in; float32, like all parameters.

    `kernel1 [c, hidden]` and `bias1 [hidden]` take standardised maps, without gain and shift.
    """

    kernel1: Float[Array, "c hidden"]
    bias1: Float[Array, " hidden"]
    kernel2: Float[Array, "hidden c"]
    bias2: Float[Array, " c"]


# What the backward passes keep: inputs, then the outputs; and the MLP's hidden layer before its activation, or nothing.
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
    """Norm2's gain and shift and the layer scale, taken into the two layers; computed in `dtype`."""
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
    """`x + keep * gain * (pool(x) - x) / std(x)`, and the moments of that.

    Args:
        pool_size: the window's side in pixels; odd.
        x: feature maps.
        x_moments: their moments.
        gain: norm1's gain times the layer scale.
        keep: drop path's factor for each image, 1 without; a constant, it gets no gradient.
        kernels: used where they can be, on the platform that they are for.
    """
    branch = partial(_pooling_branch, pool_size, kernels)
    return on_any_mesh(branch, x, x_moments, gain, keep, specs=_specs(x))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _pooling_branch(
    pool_size: int, kernels: Kernels | None, x: _Map, x_moments: Moments, gain: _PerChannel, keep: _PerImage
) -> tuple[_Map, Moments]:
    plain = partial(_pooling_residual, pool_size)
    result: tuple[_Map, Moments]
    result, _ = _run(kernels if pool_size == POOL_SIZE else None, "pooling_residual", plain, (x, x_moments, keep), gain)
    return result


def _pooling_residual(
    pool_size: int, pixels: int, inputs: _Inputs, gain: _PerChannel
) -> tuple[tuple[_Map, Moments], tuple[()]]:
    x, x_moments, keep = inputs
    x, gain = tpu_layout.group(x, pixels), tpu_layout.per_pixel(gain, pixels)
    # `pool(x) - x` cancels: in bfloat16 only the result is rounded, once.
    branch = tpu_layout.pooling_mixer(pixels, x, pool_size) * _scale(gain, x_moments.inverse_std * keep)
    y = (widen(x) + branch).astype(x.dtype)
    return (tpu_layout.ungroup(y, pixels), around(x_moments.mean, y)), ()


def _pooling_forward(
    pool_size: int, kernels: Kernels | None, x: _Map, x_moments: Moments, gain: _PerChannel, keep: _PerImage
) -> tuple[tuple[_Map, Moments], _PoolingResiduals]:
    result = _pooling_branch(pool_size, kernels, x, x_moments, gain, keep)
    return result, ((x, x_moments, keep), gain, result)


def _pooling_backward(
    pool_size: int, kernels: Kernels | None, residuals: _PoolingResiduals, cotangents: tuple[_Map, Moments]
) -> tuple[_Map, Moments, _PerChannel, _PerImage]:
    inputs, gain, outputs = residuals
    plain = partial(_pooling_gradient, pool_size)
    (dx, dvariance), dgain = _run(
        kernels if pool_size == POOL_SIZE else None, "pooling_gradient", plain, (*inputs, *outputs, *cotangents), gain
    )
    zeros = jnp.zeros_like(dvariance)
    return dx, Moments(zeros, dvariance), dgain, zeros


def _pooling_gradient(
    pool_size: int, pixels: int, gradients: _Gradients, gain: _PerChannel
) -> tuple[tuple[_Map, _PerImage], _PerChannel]:
    x, x_moments, keep, y, y_moments, dy, dmoments = gradients
    x, y, dy = (tpu_layout.group(z, pixels) for z in (x, y, dy))
    dy = through(y, y_moments, dy, dmoments)
    # Gain, std and keep are the same all over an image, so the window slides over dy alone; what multiplies x then
    # serves both dx and the two scalar gradients.
    mixed = tpu_layout.pooling_mixer_transpose(pixels, dy, pool_size)
    inverse_std = x_moments.inverse_std
    scale = _scale(tpu_layout.per_pixel(gain, pixels), inverse_std * keep)
    dx = (widen(dy) + widen(mixed) * scale).astype(x.dtype)
    per_channel = tpu_layout.over_pixels(jnp.sum(widen(x) * widen(mixed), (1, 2)), pixels) * keep[:, None]
    return (tpu_layout.ungroup(dx, pixels), -0.5 * inverse_std**3 * (per_channel @ gain)), inverse_std @ per_channel


_pooling_branch.defvjp(_pooling_forward, _pooling_backward)


def mlp_residual(
    activation: _Activation,
    x: _Map,
    x_moments: Moments,
    weights: MlpWeights,
    keep: _PerImage,
    kernels: Kernels | None = None,
) -> tuple[_Map, Moments]:
    """`x + keep * mlp((x - mean(x)) / std(x))`, and the moments of that.

    Args:
        activation: of the hidden layer, elementwise.
        x: feature maps.
        x_moments: their moments.
        weights: the two layers with norm2 and the layer scale folded in.
        keep: drop path's factor for each image, 1 without; a constant, it gets no gradient.
        kernels: used where they can be, on the platform that they are for.
    """
    branch = partial(_mlp_branch, activation, kernels)
    return on_any_mesh(branch, x, x_moments, weights, keep, specs=_specs(x))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mlp_branch(
    activation: _Activation,
    kernels: Kernels | None,
    x: _Map,
    x_moments: Moments,
    weights: MlpWeights,
    keep: _PerImage,
) -> tuple[_Map, Moments]:
    plain = partial(_mlp_residual, activation)
    result: tuple[_Map, Moments]
    result, _ = _run(kernels if activation is gelu else None, "mlp_residual", plain, (x, x_moments, keep), weights)
    return result


def _mlp_residual(
    activation: _Activation, pixels: int, inputs: _Inputs, weights: MlpWeights
) -> tuple[tuple[_Map, Moments], tuple[()]]:
    (result, _), sums = _mlp_residual_and_inner(activation, pixels, inputs, weights)
    return result, sums


def _mlp_residual_and_inner(
    activation: _Activation, pixels: int, inputs: _Inputs, weights: MlpWeights
) -> tuple[tuple[tuple[_Map, Moments], _Hidden], tuple[()]]:
    x, x_moments, keep = inputs
    x, weights = tpu_layout.group(x, pixels), _cast(weights, x.dtype)
    standard = standardize_with(x, x_moments)
    inner = _dense(pixels, standard, weights.kernel1, weights.bias1)
    branch = _dense(pixels, activation(inner), weights.kernel2, weights.bias2)
    y = x + branch * over_map(keep).astype(x.dtype)
    return ((tpu_layout.ungroup(y, pixels), around(x_moments.mean, y)), inner), ()


def _mlp_forward(
    activation: _Activation,
    kernels: Kernels | None,
    x: _Map,
    x_moments: Moments,
    weights: MlpWeights,
    keep: _PerImage,
) -> tuple[tuple[_Map, Moments], _MlpResiduals]:
    inputs = (x, x_moments, keep)
    if not cpu_batching.keep_hidden(x) or (kernels is not None and kernels.interpret):
        result = _mlp_branch(activation, kernels, x, x_moments, weights, keep)
        return result, (inputs, weights, result, ())

    def on_cpu(inputs: _Inputs, weights: MlpWeights) -> tuple[tuple[_Map, Moments], _Hidden]:
        plain = partial(_mlp_residual_and_inner, activation, 1)
        results, _ = cpu_batching.in_parts(lambda images: plain(images, weights), inputs)
        return results

    def elsewhere(inputs: _Inputs, weights: MlpWeights) -> tuple[tuple[_Map, Moments], _Hidden]:
        x, x_moments, keep = inputs
        # Every platform has to return what a CPU does. Nothing uses these zeros, and compilers leave them out.
        unused = jnp.zeros((*x.shape[:3], len(weights.bias1)), x.dtype)
        return vary_alike((_mlp_branch(activation, kernels, x, x_moments, weights, keep), unused))

    result, inner = lax.platform_dependent(inputs, weights, cpu=on_cpu, default=elsewhere)
    return result, (inputs, weights, result, (inner,))


def _mlp_backward(
    activation: _Activation,
    kernels: Kernels | None,
    residuals: _MlpResiduals,
    cotangents: tuple[_Map, Moments],
) -> tuple[_Map, Moments, MlpWeights, _PerImage]:
    inputs, weights, outputs, inner = residuals
    batched = (*inputs, *outputs, *cotangents)
    (dx, dmoments), dweights = _run(
        kernels if activation is gelu else None,
        "mlp_gradient",
        partial(_mlp_gradient, activation),
        batched,
        weights,
        kept=inner,
        # There nothing fuses with matrix products: what the activation shares with its derivative, a float32 array as
        # large as the hidden layer, would be written and read.
        on_gpu=partial(_mlp_gradient, jax.checkpoint(activation)),
    )
    return dx, dmoments, MlpWeights(*dweights), jnp.zeros_like(inputs[2])


def _mlp_gradient(
    activation: _Activation, pixels: int, gradients: tuple[Any, ...], weights: MlpWeights
) -> tuple[tuple[_Map, Moments], tuple[Array, ...]]:
    x, x_moments, keep, y, y_moments, dy, dmoments, *kept = gradients
    x, y, dy = (tpu_layout.group(z, pixels) for z in (x, y, dy))
    dy = through(y, y_moments, dy, dmoments)
    cast = _cast(weights, x.dtype)
    standard = standardize_with(x, x_moments)
    (inner,) = kept or (_dense(pixels, standard, cast.kernel1, cast.bias1),)
    hidden, activation_vjp = jax.vjp(activation, inner)

    dbranch = dy * over_map(keep).astype(dy.dtype)
    (dinner,) = activation_vjp(tpu_layout.dense(pixels, dbranch, cast.kernel2.T))
    inner_sums = tpu_layout.over_pixels(jnp.sum(widen(dinner), (1, 2)), pixels)
    product_sums = tpu_layout.over_pixels(jnp.sum(widen(dinner) * widen(inner), (1, 2)), pixels)
    dweights = (
        tpu_layout.dense_gradient(pixels, standard, dinner),
        jnp.sum(inner_sums, 0),
        tpu_layout.dense_gradient(pixels, hidden, dbranch),
        tpu_layout.over_pixels(jnp.sum(widen(dbranch), (0, 1, 2)), pixels),
    )
    # The gradient of `standard = (x - mean) * inverse_std` by x, mean and variance. The last two are sums of it over
    # the map; taken from sums over the hidden layer, they are known before it and need no pass of their own:
    # sum(dstandard) = sum(dinner) @ kernel1.T, and standard @ kernel1 = inner - bias1.
    dstandard = widen(tpu_layout.dense(pixels, dinner, cast.kernel1.T))
    dx = (widen(dy) + dstandard * over_map(x_moments.inverse_std)).astype(dy.dtype)
    total = inner_sums @ jnp.sum(widen(cast.kernel1), 0)
    products = jnp.sum(product_sums, 1) - inner_sums @ widen(cast.bias1)
    return (tpu_layout.ungroup(dx, pixels), through_standardized(x_moments, total, products)), dweights


_mlp_branch.defvjp(_mlp_forward, _mlp_backward)


def _run(
    kernels: Kernels | None,
    name: Pass,
    plain: Callable[..., Any],
    batched: Any,
    replicated: Any,
    kept: tuple[Any, ...] = (),
    on_gpu: Callable[..., Any] | None = None,
) -> Any:
    """(results for each image, sums over all images) of a pass, in the way of the platform that is compiled for.

    A CPU's pass also takes what it has `kept`, after what is `batched`; a GPU may have one of its own.
    """
    x = batched[0]
    pixels = tpu_layout.group_size(x.shape[2], x.shape[3], x.dtype)
    hidden_features = len(replicated.bias1) if isinstance(replicated, MlpWeights) else None

    def on_cpu(batched: Any, replicated: Any, kept: Any) -> Any:
        return cpu_batching.in_parts(lambda images: plain(1, images, replicated), (*batched, *kept))

    def on_tpu(batched: Any, replicated: Any, _: Any) -> Any:
        return plain(pixels, batched, replicated)

    def elsewhere(batched: Any, replicated: Any, _: Any) -> Any:
        return (on_gpu or plain)(1, batched, replicated)

    ways = {"cpu": on_cpu, "tpu": on_tpu, "default": elsewhere}
    if kernels is not None and kernels.supports(name, x, hidden_features):

        def by_kernel(batched: Any, replicated: Any, _: Any) -> Any:
            return kernels.call(name, pixels, batched, replicated)

        if kernels.interpret:
            return by_kernel(batched, replicated, kept)
        ways[kernels.platform] = by_kernel
    return lax.platform_dependent(batched, replicated, kept, **ways)


def _dense(
    pixels: int, x: Float[Array, "b h w2 c2"], kernel: Float[Array, "c d"], bias: Float[Array, " d"]
) -> Float[Array, "b h w2 d2"]:
    """A dense layer on each pixel of a group."""
    y = tpu_layout.dense(pixels, x, kernel)
    return y + over_channels(tpu_layout.per_pixel(bias, pixels), y)


def _specs(x: _Map) -> tuple[PartitionSpec, PartitionSpec]:
    """How a branch's results are shared: maps as its input, moments as the batch."""
    spec = spec_of(x)
    return PartitionSpec(*spec), PartitionSpec(spec[0])


def _cast(weights: MlpWeights, dtype: Dtype) -> MlpWeights:
    return MlpWeights(*(weight.astype(dtype) for weight in weights))


def _scale(gain: _PerChannel, per_image: _PerImage) -> Float[Array, "b 1 1 c"]:
    return (per_image[:, None] * gain[None])[:, None, None, :]

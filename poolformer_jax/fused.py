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
   which costs less than writing it and reading it back.

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
from jaxtyping import Array, Float

from poolformer_jax import caches, lanes

EPSILON = 1e-5

_Map = Float[Array, "b h w c"]
_PerImage = Float[Array, " b"]
_PerChannel = Float[Array, " c"]
_Activation = Callable[[Array], Array]
_AXES = (1, 2, 3)


class Moments(NamedTuple):
    """Mean and variance of each image over height, width and channels, in at least float32."""

    mean: _PerImage
    variance: _PerImage

    @property
    def inverse_std(self) -> _PerImage:
        """What group norm multiplies with."""
        return lax.rsqrt(self.variance + EPSILON)


class MlpWeights(NamedTuple):
    """Two dense layers with everything around them folded in; float32, like all parameters.

    `kernel1 [c, hidden]` and `bias1 [hidden]` take standardised maps, without gain and shift.
    """

    kernel1: Float[Array, "c hidden"]
    bias1: Float[Array, " hidden"]
    kernel2: Float[Array, "hidden c"]
    bias2: Float[Array, " c"]


# What the backward passes keep: inputs, then the outputs.
_PoolingResiduals = tuple[_Map, Moments, _PerChannel, _PerImage, _Map, Moments]
_MlpResiduals = tuple[_Map, Moments, MlpWeights, _PerImage, _Map, Moments]


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
    return MlpWeights(gain[:, None] * kernel1, shift @ kernel1 + bias1, kernel2 * scale, bias2 * scale)


@jax.custom_vjp
def moments(x: _Map) -> Moments:
    """The moments of a map that comes without: mean first, then the variance from centred values."""
    x = _wide(x)
    mean = jnp.mean(x, _AXES)
    return Moments(mean, jnp.mean(jnp.square(x - _over_map(mean)), _AXES))


def _moments_forward(x: _Map) -> tuple[Moments, tuple[_Map, Moments]]:
    x_moments = moments(x)
    return x_moments, (x, x_moments)


def _moments_backward(residuals: tuple[_Map, Moments], dmoments: Moments) -> tuple[_Map]:
    x, x_moments = residuals
    return (_through_moments(x, x_moments, jnp.zeros_like(x), dmoments),)


moments.defvjp(_moments_forward, _moments_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def pooling_residual(
    pool_size: int, x: _Map, x_moments: Moments, gain: _PerChannel, keep: _PerImage
) -> tuple[_Map, Moments]:
    """`x + keep * gain * (pool(x) - x) / std(x)`, and the moments of that.

    Args:
        pool_size: the window's side in pixels; odd.
        x: feature maps.
        x_moments: their moments.
        gain: norm1's gain times the layer scale.
        keep: drop path's factor for each image, 1 without; a constant, it gets no gradient.
    """
    function, in_parts = partial(_pooling_residual, pool_size), partial(_pooling_residual_in_parts, pool_size)
    return lanes.choose(_pixels(x), function, x, x_moments, gain, keep, cpu=in_parts)


def _pooling_residual_in_parts(
    pool_size: int, x: _Map, x_moments: Moments, gain: _PerChannel, keep: _PerImage
) -> tuple[_Map, Moments]:
    def part(images: tuple[_Map, Moments, _PerImage]) -> tuple[tuple[_Map, Moments], tuple[()]]:
        x, x_moments, keep = images
        return _pooling_residual(pool_size, 1, x, x_moments, gain, keep), ()

    results, _ = caches.in_parts(part, (x, x_moments, keep))
    return results


def _pooling_residual(
    pool_size: int, pixels: int, x: _Map, x_moments: Moments, gain: _PerChannel, keep: _PerImage
) -> tuple[_Map, Moments]:
    x, gain = lanes.group(x, pixels), lanes.per_pixel(gain, pixels)
    # `pool(x) - x` cancels: in bfloat16 only the result is rounded, once.
    branch = lanes.pooling_mixer(pixels, x, pool_size) * _over_channels(gain, x_moments.inverse_std * keep)
    y = (_wide(x) + branch).astype(x.dtype)
    return lanes.ungroup(y, pixels), _moments_around(x_moments.mean, y)


def _pooling_forward(
    pool_size: int, x: _Map, x_moments: Moments, gain: _PerChannel, keep: _PerImage
) -> tuple[tuple[_Map, Moments], _PoolingResiduals]:
    y, y_moments = pooling_residual(pool_size, x, x_moments, gain, keep)
    return (y, y_moments), (x, x_moments, gain, keep, y, y_moments)


def _pooling_backward(
    pool_size: int, residuals: _PoolingResiduals, cotangents: tuple[_Map, Moments]
) -> tuple[_Map, Moments, _PerChannel, _PerImage]:
    function, in_parts = partial(_pooling_gradient, pool_size), partial(_pooling_gradient_in_parts, pool_size)
    dx, dvariance, dgain = lanes.choose(_pixels(residuals[0]), function, *residuals, *cotangents, cpu=in_parts)
    zeros = jnp.zeros_like(dvariance)
    return dx, Moments(zeros, dvariance), dgain, zeros


def _pooling_gradient_in_parts(
    pool_size: int,
    x: _Map,
    x_moments: Moments,
    gain: _PerChannel,
    keep: _PerImage,
    y: _Map,
    y_moments: Moments,
    dy: _Map,
    dmoments: Moments,
) -> tuple[_Map, _PerImage, _PerChannel]:
    def part(images: Any) -> tuple[tuple[_Map, _PerImage], _PerChannel]:
        x, x_moments, keep, *rest = images
        dx, dvariance, dgain = _pooling_gradient(pool_size, 1, x, x_moments, gain, keep, *rest)
        return (dx, dvariance), dgain

    (dx, dvariance), dgain = caches.in_parts(part, (x, x_moments, keep, y, y_moments, dy, dmoments))
    return dx, dvariance, dgain


def _pooling_gradient(
    pool_size: int,
    pixels: int,
    x: _Map,
    x_moments: Moments,
    gain: _PerChannel,
    keep: _PerImage,
    y: _Map,
    y_moments: Moments,
    dy: _Map,
    dmoments: Moments,
) -> tuple[_Map, _PerImage, _PerChannel]:
    x, y, dy = (lanes.group(z, pixels) for z in (x, y, dy))
    dy = _through_moments(y, y_moments, dy, dmoments)
    # Gain, std and keep are the same all over an image, so the window slides over dy alone; what multiplies x then
    # serves both dx and the two scalar gradients.
    mixed = lanes.pooling_mixer_transpose(pixels, dy, pool_size)
    inverse_std = x_moments.inverse_std
    scale = _over_channels(lanes.per_pixel(gain, pixels), inverse_std * keep)
    dx = (_wide(dy) + _wide(mixed) * scale).astype(x.dtype)
    per_channel = lanes.over_pixels(jnp.sum(_wide(x) * _wide(mixed), (1, 2)), pixels) * keep[:, None]
    return lanes.ungroup(dx, pixels), -0.5 * inverse_std**3 * (per_channel @ gain), inverse_std @ per_channel


pooling_residual.defvjp(_pooling_forward, _pooling_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def mlp_residual(
    activation: _Activation, x: _Map, x_moments: Moments, weights: MlpWeights, keep: _PerImage
) -> tuple[_Map, Moments]:
    """`x + keep * mlp((x - mean(x)) / std(x))`, and the moments of that.

    Args:
        activation: of the hidden layer, elementwise.
        x: feature maps.
        x_moments: their moments.
        weights: the two layers with norm2 and the layer scale folded in.
        keep: drop path's factor for each image, 1 without; a constant, it gets no gradient.
    """
    function, in_parts = partial(_mlp_residual, activation), partial(_mlp_residual_in_parts, activation)
    return lanes.choose(_pixels(x), function, x, x_moments, weights, keep, cpu=in_parts)


def _mlp_residual_in_parts(
    activation: _Activation, x: _Map, x_moments: Moments, weights: MlpWeights, keep: _PerImage
) -> tuple[_Map, Moments]:
    def part(images: tuple[_Map, Moments, _PerImage]) -> tuple[tuple[_Map, Moments], tuple[()]]:
        x, x_moments, keep = images
        return _mlp_residual(activation, 1, x, x_moments, weights, keep), ()

    results, _ = caches.in_parts(part, (x, x_moments, keep))
    return results


def _mlp_residual(
    activation: _Activation, pixels: int, x: _Map, x_moments: Moments, weights: MlpWeights, keep: _PerImage
) -> tuple[_Map, Moments]:
    x, weights = lanes.group(x, pixels), _cast(weights, x.dtype)
    hidden = lanes.dense(pixels, _standardize(x, x_moments), weights.kernel1)
    hidden = activation(hidden + lanes.per_pixel(weights.bias1, pixels))
    branch = lanes.dense(pixels, hidden, weights.kernel2) + lanes.per_pixel(weights.bias2, pixels)
    y = x + branch * _over_map(keep).astype(x.dtype)
    return lanes.ungroup(y, pixels), _moments_around(x_moments.mean, y)


def _mlp_forward(
    activation: _Activation, x: _Map, x_moments: Moments, weights: MlpWeights, keep: _PerImage
) -> tuple[tuple[_Map, Moments], _MlpResiduals]:
    y, y_moments = mlp_residual(activation, x, x_moments, weights, keep)
    return (y, y_moments), (x, x_moments, weights, keep, y, y_moments)


def _mlp_backward(
    activation: _Activation, residuals: _MlpResiduals, cotangents: tuple[_Map, Moments]
) -> tuple[_Map, Moments, MlpWeights, _PerImage]:
    function, in_parts = partial(_mlp_gradient, activation), partial(_mlp_gradient_in_parts, activation)
    dx, dmoments, dweights = lanes.choose(_pixels(residuals[0]), function, *residuals, *cotangents, cpu=in_parts)
    return dx, dmoments, dweights, jnp.zeros_like(residuals[3])


def _mlp_gradient_in_parts(
    activation: _Activation,
    x: _Map,
    x_moments: Moments,
    weights: MlpWeights,
    keep: _PerImage,
    y: _Map,
    y_moments: Moments,
    dy: _Map,
    dmoments: Moments,
) -> tuple[_Map, Moments, MlpWeights]:
    def part(images: Any) -> tuple[tuple[_Map, Moments], MlpWeights]:
        x, x_moments, keep, *rest = images
        dx, dmoments, dweights = _mlp_gradient(activation, 1, x, x_moments, weights, keep, *rest)
        return (dx, dmoments), dweights

    (dx, dmoments), dweights = caches.in_parts(part, (x, x_moments, keep, y, y_moments, dy, dmoments))
    return dx, dmoments, dweights


def _mlp_gradient(
    activation: _Activation,
    pixels: int,
    x: _Map,
    x_moments: Moments,
    weights: MlpWeights,
    keep: _PerImage,
    y: _Map,
    y_moments: Moments,
    dy: _Map,
    dmoments: Moments,
) -> tuple[_Map, Moments, MlpWeights]:
    x, y, dy = (lanes.group(z, pixels) for z in (x, y, dy))
    dy = _through_moments(y, y_moments, dy, dmoments)
    cast = _cast(weights, x.dtype)
    standard = _standardize(x, x_moments)
    inner = lanes.dense(pixels, standard, cast.kernel1) + lanes.per_pixel(cast.bias1, pixels)
    hidden, activation_vjp = jax.vjp(activation, inner)

    dbranch = dy * _over_map(keep).astype(dy.dtype)
    (dinner,) = activation_vjp(lanes.dense(pixels, dbranch, cast.kernel2.T))
    inner_sums = lanes.over_pixels(jnp.sum(_wide(dinner), (1, 2)), pixels)
    product_sums = lanes.over_pixels(jnp.sum(_wide(dinner) * _wide(inner), (1, 2)), pixels)
    dweights = MlpWeights(
        kernel1=lanes.dense_gradient(pixels, standard, dinner),
        bias1=jnp.sum(inner_sums, 0),
        kernel2=lanes.dense_gradient(pixels, hidden, dbranch),
        bias2=lanes.over_pixels(jnp.sum(_wide(dbranch), (0, 1, 2)), pixels),
    )
    # The gradient of `standard = (x - mean) * inverse_std` by x, mean and variance. The last two are sums of it over
    # the map; taken from sums over the hidden layer, they are known before it and need no pass of their own:
    # sum(dstandard) = sum(dinner) @ kernel1.T, and standard @ kernel1 = inner - bias1.
    inverse_std = x_moments.inverse_std
    dstandard = _wide(lanes.dense(pixels, dinner, cast.kernel1.T))
    dx = (_wide(dy) + dstandard * _over_map(inverse_std)).astype(dy.dtype)
    dmean = -inverse_std * (inner_sums @ jnp.sum(_wide(cast.kernel1), 0))
    dvariance = -0.5 * inverse_std**2 * (jnp.sum(product_sums, 1) - inner_sums @ _wide(cast.bias1))
    return lanes.ungroup(dx, pixels), Moments(dmean, dvariance), dweights


mlp_residual.defvjp(_mlp_forward, _mlp_backward)


def _pixels(x: _Map) -> int:
    return lanes.group_size(x.shape[2], x.shape[3], x.dtype)


def _cast(weights: MlpWeights, dtype: Dtype) -> MlpWeights:
    return MlpWeights(*(weight.astype(dtype) for weight in weights))


def _moments_around(pivot: _PerImage, y: _Map) -> Moments:
    """Moments in one pass, from sums around a value near the mean."""
    distance = _wide(y) - _over_map(pivot)
    offset = jnp.mean(distance, _AXES)
    # Rounding may leave less than nothing where an image is constant.
    return Moments(pivot + offset, jnp.maximum(jnp.mean(jnp.square(distance), _AXES) - jnp.square(offset), 0))


def _through_moments(y: _Map, y_moments: Moments, dy: _Map, dmoments: Moments) -> _Map:
    """The whole gradient of `y`: its own, and what reaches it through its mean and variance."""
    size = y[0].size
    offset = dmoments.mean / size - 2 * dmoments.variance / size * y_moments.mean
    slope = 2 * dmoments.variance / size
    return (_wide(dy) + _wide(y) * _over_map(slope) + _over_map(offset)).astype(dy.dtype)


def _standardize(x: _Map, x_moments: Moments) -> _Map:
    return ((_wide(x) - _over_map(x_moments.mean)) * _over_map(x_moments.inverse_std)).astype(x.dtype)


def _over_map(per_image: _PerImage) -> Float[Array, "b 1 1 1"]:
    return per_image[:, None, None, None]


def _over_channels(per_channel: Float[Array, " c"], per_image: _PerImage) -> Float[Array, "b 1 1 c"]:
    return (per_image[:, None] * per_channel)[:, None, None, :]


def _wide(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """At least float32, for sums."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))

"""The kernels on TPUs, as `fused` calls them: maps with the images first, moments, and the matrices of one pixel.

Each function takes what it needs of every image, then what it needs once, and returns in the same order: results for
each image, then sums over all images.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from poolformer_jax.network.fused import statistics, tpu_layout
from poolformer_jax.network.fused.kernels import tpu_mlp, tpu_pooling
from poolformer_jax.network.fused.kernels.choice import Pass, TpuKernels
from poolformer_jax.network.fused.kernels.tpu_tiles import images_first, positions_first
from poolformer_jax.network.fused.statistics import Moments

_Map = Float[Array, "b h w c"]
_PerImage = Float[Array, " b"]
_PerChannel = Float[Array, " c"]
_Weights = tuple[Float[Array, "c hidden"], Float[Array, " hidden"], Float[Array, "hidden c"], Float[Array, " c"]]


def pooling_residual(
    kernels: TpuKernels, pixels: int, batched: tuple[_Map, Moments, _PerImage], gain: _PerChannel
) -> tuple[tuple[_Map, Moments], tuple[()]]:
    """`fused.pooling_residual` of (x, its moments, keep)."""
    x, x_moments, keep = batched
    y, sums, _ = kernels.on_each_device(
        partial(tpu_pooling.forward, pixels=pixels, interpret=kernels.interpret),
        (positions_first(x, pixels),),
        (x_moments.mean, _scale(gain, x_moments.inverse_std * keep, pixels)),
        (),
        batch_axis=2,
    )
    return (images_first(y, pixels), _moments(x, x_moments.mean, *sums)), ()


def pooling_gradient(
    kernels: TpuKernels,
    pixels: int,
    batched: tuple[_Map, Moments, _PerImage, _Map, Moments, _Map, Moments],
    gain: _PerChannel,
) -> tuple[tuple[_Map, _PerImage], _PerChannel]:
    """The gradient of `pooling_residual` by x, its variance, and gain, of (x, .., keep, y, .., dy, ..)."""
    x, x_moments, keep, y, y_moments, dy, dmoments = batched
    inverse_std = x_moments.inverse_std
    through_moments = statistics.slope_and_offset(math.prod(y.shape[1:]), y_moments, dmoments)
    dx, (total,), _ = kernels.on_each_device(
        partial(tpu_pooling.backward, pixels=pixels, interpret=kernels.interpret),
        tuple(positions_first(z, pixels) for z in (x, y, dy)),
        (*through_moments, _scale(gain, inverse_std * keep, pixels)),
        (),
        batch_axis=2,
    )
    per_channel = tpu_layout.over_pixels(total, pixels) * keep[:, None]
    return (images_first(dx, pixels), -0.5 * inverse_std**3 * (per_channel @ gain)), inverse_std @ per_channel


def mlp_residual(
    kernels: TpuKernels, pixels: int, batched: tuple[_Map, Moments, _PerImage], weights: _Weights
) -> tuple[tuple[_Map, Moments], tuple[()]]:
    """`fused.mlp_residual` of (x, its moments, keep)."""
    x, x_moments, keep = batched
    y, sums, _ = kernels.on_each_device(
        partial(tpu_mlp.forward, interpret=kernels.interpret),
        (positions_first(x, pixels),),
        (x_moments.mean, x_moments.inverse_std, keep),
        _blocks(weights, pixels),
        batch_axis=2,
    )
    return (images_first(y, pixels), _moments(x, x_moments.mean, *sums)), ()


def mlp_gradient(
    kernels: TpuKernels,
    pixels: int,
    batched: tuple[_Map, Moments, _PerImage, _Map, Moments, _Map, Moments],
    weights: _Weights,
) -> tuple[tuple[_Map, Moments], _Weights]:
    """The gradient of `mlp_residual` by x, its moments, and the weights, of (x, .., keep, y, .., dy, ..)."""
    x, x_moments, keep, y, y_moments, dy, dmoments = batched
    through_moments = statistics.slope_and_offset(math.prod(y.shape[1:]), y_moments, dmoments)
    dx, (total, products), dweights = kernels.on_each_device(
        partial(tpu_mlp.backward, pixels=pixels, interpret=kernels.interpret),
        tuple(positions_first(z, pixels) for z in (x, y, dy)),
        (x_moments.mean, x_moments.inverse_std, keep, *through_moments),
        _blocks(weights, pixels),
        batch_axis=2,
    )
    of_moments = statistics.through_standardized(x_moments, total.sum(1), products.sum(1))
    return (images_first(dx, pixels), of_moments), dweights


def _scale(gain: _PerChannel, per_image: _PerImage, pixels: int) -> Float[Array, "b c2"]:
    return per_image[:, None] * tpu_layout.per_pixel(gain, pixels)


def _blocks(
    weights: _Weights, pixels: int
) -> tuple[Float[Array, "c2 hidden2"], Float[Array, " hidden2"], Float[Array, "hidden2 c2"], Float[Array, " c2"]]:
    """Weights for all pixels of a position: block-diagonal matrices in bfloat16, vectors in float32."""
    kernel1, bias1, kernel2, bias2 = weights
    return _block(kernel1, pixels), _vector(bias1, pixels), _block(kernel2, pixels), _vector(bias2, pixels)


def _block(kernel: Float[Array, "c d"], pixels: int) -> Float[Array, "c2 d2"]:
    return jnp.kron(jnp.eye(pixels, dtype=jnp.bfloat16), kernel.astype(jnp.bfloat16))


def _vector(bias: Float[Array, " c"], pixels: int) -> Float[Array, " c2"]:
    return tpu_layout.per_pixel(bias.astype(jnp.float32), pixels)


def _moments(x: _Map, pivot: _PerImage, total: Float[Array, "b c2"], squares: Float[Array, "b c2"]) -> Moments:
    return statistics.from_sums(pivot, math.prod(x.shape[1:]), total.sum(1), squares.sum(1))


PASSES: Mapping[Pass, Callable[[TpuKernels, int, Any, Any], tuple[Any, Any]]] = {
    "pooling_residual": pooling_residual,
    "pooling_gradient": pooling_gradient,
    "mlp_residual": mlp_residual,
    "mlp_gradient": mlp_gradient,
}

"""The kernels on TPUs, with the arguments that `block` passes: maps [batch, ...], moments, and ungrouped matrices.

Each function takes arrays of the batch, then parameters; it returns results for each image, then sums over all images.
The arrays of a gradient are x, its moments, keep; y, its moments; and the gradients of these two.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from poolformer_jax.network.fused import statistics, tpu_layout
from poolformer_jax.network.fused.kernels import (
    tpu_attention,
    tpu_dense_residual,
    tpu_depthwise,
    tpu_mlp,
    tpu_norm,
    tpu_norm_dense,
    tpu_norm_mlp,
    tpu_pooling,
)
from poolformer_jax.network.fused.kernels.base import Kernels, Pass
from poolformer_jax.network.fused.kernels.tpu_tiles import batch_first, positions_first
from poolformer_jax.network.fused.statistics import Moments

_Map = Float[Array, "b h w c"]
_PerImage = Float[Array, " b"]
_PerChannel = Float[Array, " c"]
_WindowKernel = Float[Array, "k k 1 c"]
_Weights = tuple[Float[Array, "c hidden"], Float[Array, " hidden"], Float[Array, "hidden c"], Float[Array, " c"]]

_Heads = Float[Array, "b heads d n"]
_Hidden = Float[Array, "b h w hidden"]
_Dense = tuple[Float[Array, "hidden c"], _PerChannel]
_NormDense = tuple[Float[Array, ""], Any]
_NormMlp = tuple[Float[Array, ""], _PerChannel, Any]


def pooling_residual(
    kernels: Kernels, pixels: int, batched: tuple[_Map, Moments, _PerImage], gain: _PerChannel
) -> tuple[tuple[_Map, Moments], tuple[()]]:
    """`block.pooling_residual` of (x, its moments, keep)."""
    x, x_moments, keep = batched
    y, sums, _ = kernels.run_on_shards(
        partial(tpu_pooling.forward, pixels=pixels, interpret=kernels.interpret),
        (positions_first(x, pixels),),
        (x_moments.mean, _scale(gain, x_moments.inverse_std * keep, pixels)),
        (),
        batch_axis=2,
    )
    return (batch_first(y, pixels), _moments(x, x_moments.mean, *sums)), ()


def pooling_gradient(
    kernels: Kernels,
    pixels: int,
    batched: tuple[_Map, Moments, _PerImage, _Map, Moments, _Map, Moments],
    gain: _PerChannel,
) -> tuple[tuple[_Map, _PerImage], _PerChannel]:
    """The gradient of `pooling_residual` by x, its variance, and gain."""
    x, x_moments, keep, y, y_moments, dy, dmoments = batched
    inverse_std = x_moments.inverse_std
    coefficients = statistics.moments_gradient_coefficients(math.prod(y.shape[1:]), y_moments, dmoments)
    dx, (total,), _ = kernels.run_on_shards(
        partial(tpu_pooling.backward, pixels=pixels, interpret=kernels.interpret),
        tuple(positions_first(z, pixels) for z in (x, y, dy)),
        (*coefficients, _scale(gain, inverse_std * keep, pixels)),
        (),
        batch_axis=2,
    )
    per_channel = tpu_layout.sum_pixels(total, pixels) * keep[:, None]
    return (batch_first(dx, pixels), -0.5 * inverse_std**3 * (per_channel @ gain)), inverse_std @ per_channel


def mlp_residual(
    kernels: Kernels, pixels: int, batched: tuple[_Map, Moments, _PerImage], weights: _Weights
) -> tuple[tuple[_Map, Moments], tuple[()]]:
    """`block.mlp_residual` of (x, its moments, keep)."""
    x, x_moments, keep = batched
    y, sums, _ = kernels.run_on_shards(
        partial(tpu_mlp.forward, interpret=kernels.interpret),
        (positions_first(x, pixels),),
        (x_moments.mean, x_moments.inverse_std, keep),
        _grouped_weights(weights, pixels),
        batch_axis=2,
    )
    return (batch_first(y, pixels), _moments(x, x_moments.mean, *sums)), ()


def mlp_gradient(
    kernels: Kernels,
    pixels: int,
    batched: tuple[_Map, Moments, _PerImage, _Map, Moments, _Map, Moments],
    weights: _Weights,
) -> tuple[tuple[_Map, Moments], _Weights]:
    """The gradient of `mlp_residual` by x, its moments, and the weights."""
    x, x_moments, keep, y, y_moments, dy, dmoments = batched
    coefficients = statistics.moments_gradient_coefficients(math.prod(y.shape[1:]), y_moments, dmoments)
    dx, (total, products), dweights = kernels.run_on_shards(
        partial(tpu_mlp.backward, pixels=pixels, interpret=kernels.interpret),
        tuple(positions_first(z, pixels) for z in (x, y, dy)),
        (x_moments.mean, x_moments.inverse_std, keep, *coefficients),
        _grouped_weights(weights, pixels),
        batch_axis=2,
    )
    dmoments = statistics.standardize_gradient_of_moments(x_moments, total.sum(1), products.sum(1))
    return (batch_first(dx, pixels), dmoments), dweights


def depthwise_convolution(
    kernels: Kernels, _: int, batched: tuple[_Map], kernel: _WindowKernel
) -> tuple[_Map, tuple[()]]:
    """`functional.depthwise_convolution` of (x)."""
    return _run(kernels, tpu_depthwise.forward, batched, (), (kernel,))


def depthwise_gradient(
    kernels: Kernels, _: int, batched: tuple[_Map, _Map], kernel: _WindowKernel
) -> tuple[_Map, _WindowKernel]:
    """The gradients of `depthwise_convolution` by x and by the kernel; the arrays are x and the gradient of y."""
    return _run(kernels, tpu_depthwise.backward, batched, (), (kernel,))


def norm_mlp_residual(
    kernels: Kernels, _: int, batched: tuple[_Map, _PerImage], parameters: _NormMlp
) -> tuple[_Map, tuple[()]]:
    """`norm_mlp.norm_mlp_residual` of (x, keep)."""
    x, keep = batched
    return _run(kernels, tpu_norm_mlp.forward, (x,), (keep,), _norm_mlp_parameters(parameters))


def norm_mlp_gradient(
    kernels: Kernels, _: int, batched: tuple[_Map, _PerImage, _Map], parameters: _NormMlp
) -> tuple[_Map, tuple[_PerChannel, _Weights]]:
    """The gradients of `norm_mlp_residual` by x, trunk and weights; the arrays are x, keep and the gradient of y."""
    x, keep, dy = batched
    dx, (dtrunk, *dweights) = _run(kernels, tpu_norm_mlp.backward, (x, dy), (keep,), _norm_mlp_parameters(parameters))
    return dx, (dtrunk, type(parameters[2])(*dweights))


def norm_dense(
    kernels: Kernels, _: int, batched: tuple[_Map], parameters: _NormDense
) -> tuple[Float[Array, "b h w hidden"], tuple[()]]:
    """The first result of `norm_dense.norm_dense` of (x)."""
    return _run(kernels, tpu_norm_dense.forward, batched, (), _norm_dense_parameters(parameters))


def norm_dense_gradient(
    kernels: Kernels, _: int, batched: tuple[_Map, _Map, Float[Array, "b h w hidden"]], parameters: _NormDense
) -> tuple[_Map, Any]:
    """The gradients of `norm_dense` by x and by the weights; the arrays are x and the gradients of x and hidden."""
    dx, dweights = _run(kernels, tpu_norm_dense.backward, batched, (), _norm_dense_parameters(parameters))
    return dx, type(parameters[1])(*dweights)


def dense_residual(
    kernels: Kernels, _: int, batched: tuple[_Map, _Hidden, _PerImage], parameters: _Dense
) -> tuple[_Map, tuple[()]]:
    """`dense_residual.dense_residual` of (x, hidden, keep)."""
    *maps, keep = batched
    return _run(kernels, tpu_dense_residual.forward, maps, (keep,), _dense_parameters(parameters))


def dense_residual_gradient(
    kernels: Kernels, _: int, batched: tuple[_Map, _Hidden, _PerImage], parameters: _Dense
) -> tuple[_Hidden, _Dense]:
    """The gradients of `dense_residual` by hidden, kernel and bias; the arrays are the gradient of y, hidden, keep."""
    *maps, keep = batched
    return _run(kernels, tpu_dense_residual.backward, maps, (keep,), _dense_parameters(parameters))


def layer_norm(kernels: Kernels, _: int, batched: tuple[_Map], parameters: tuple[Array, ...]) -> tuple[_Map, tuple[()]]:
    """`norm.layer_norm` of (x)."""
    return _run(kernels, tpu_norm.forward, batched, (), parameters)


def layer_norm_gradient(
    kernels: Kernels, _: int, batched: tuple[_Map, ...], parameters: tuple[Array, ...]
) -> tuple[_Map, tuple[_PerChannel, _PerChannel]]:
    """`norm.layer_norm_gradient`; the arrays are x, the gradient of y, and maybe another gradient of x."""
    return _run(kernels, tpu_norm.backward, batched, (), parameters)


def attention(
    kernels: Kernels, _: int, batched: tuple[_Heads, _Heads, _Heads], __: tuple[()]
) -> tuple[_Heads, tuple[()]]:
    """`self_attention.attend_heads` of (query, key, value)."""
    kernel = partial(tpu_attention.forward, interpret=kernels.interpret)
    return kernels.run_on_shards(kernel, batched, (), (), batch_axis=0)[0], ()


def attention_gradient(
    kernels: Kernels, _: int, batched: tuple[_Heads, _Heads, _Heads, _Heads], __: tuple[()]
) -> tuple[tuple[_Heads, _Heads, _Heads], tuple[()]]:
    """The gradients of `attention` by query, key and value; the last array is the gradient of the result."""
    kernel = partial(tpu_attention.backward, interpret=kernels.interpret)
    return kernels.run_on_shards(kernel, batched, (), (), batch_axis=0)[0], ()


def _run(
    kernels: Kernels,
    kernel: Callable[..., Any],
    maps: Sequence[Float[Array, "b h w _"]],
    vectors: tuple[_PerImage, ...],
    parameters: tuple[Array, ...],
) -> tuple[Any, Any]:
    """The map that `kernel` computes from maps without groups of pixels, and its sums over all images."""
    y, _, totals = kernels.run_on_shards(
        partial(kernel, interpret=kernels.interpret),
        tuple(positions_first(x, 1) for x in maps),
        vectors,
        parameters,
        batch_axis=2,
    )
    return batch_first(y, 1), totals


def _dense_parameters(parameters: _Dense) -> tuple[Array, ...]:
    kernel, bias = parameters
    return kernel.astype(jnp.bfloat16), bias.astype(jnp.float32)


def _norm_dense_parameters(parameters: _NormDense) -> tuple[Array, ...]:
    epsilon, (kernel, *vectors) = parameters
    return epsilon, kernel.astype(jnp.bfloat16), *(vector.astype(jnp.float32) for vector in vectors)


def _norm_mlp_parameters(parameters: _NormMlp) -> tuple[Array, ...]:
    epsilon, trunk, weights = parameters
    return epsilon, trunk.astype(jnp.float32), *_grouped_weights(weights, 1)


def _scale(gain: _PerChannel, per_image: _PerImage, pixels: int) -> Float[Array, "b c2"]:
    return per_image[:, None] * tpu_layout.tile_channels(gain, pixels)


def _grouped_weights(
    weights: _Weights, pixels: int
) -> tuple[Float[Array, "c2 hidden2"], Float[Array, " hidden2"], Float[Array, "hidden2 c2"], Float[Array, " c2"]]:
    """The weights of a group of pixels: block-diagonal matrices in bfloat16, vectors in float32."""
    kernel1, bias1, kernel2, bias2 = weights
    return (
        _block_diagonal(kernel1, pixels),
        _tiled(bias1, pixels),
        _block_diagonal(kernel2, pixels),
        _tiled(bias2, pixels),
    )


def _block_diagonal(kernel: Float[Array, "c d"], pixels: int) -> Float[Array, "c2 d2"]:
    return jnp.kron(jnp.eye(pixels, dtype=jnp.bfloat16), kernel.astype(jnp.bfloat16))


def _tiled(bias: Float[Array, " c"], pixels: int) -> Float[Array, " c2"]:
    return tpu_layout.tile_channels(bias.astype(jnp.float32), pixels)


def _moments(x: _Map, pivot: _PerImage, total: Float[Array, "b c2"], squares: Float[Array, "b c2"]) -> Moments:
    return statistics.moments_from_sums(pivot, math.prod(x.shape[1:]), total.sum(1), squares.sum(1))


PASSES: Mapping[Pass, Callable[[Kernels, int, Any, Any], tuple[Any, Any]]] = {
    "pooling_residual": pooling_residual,
    "pooling_gradient": pooling_gradient,
    "mlp_residual": mlp_residual,
    "mlp_gradient": mlp_gradient,
    "depthwise_convolution": depthwise_convolution,
    "depthwise_gradient": depthwise_gradient,
    "norm_mlp_residual": norm_mlp_residual,
    "norm_mlp_gradient": norm_mlp_gradient,
    "norm_dense": norm_dense,
    "norm_dense_gradient": norm_dense_gradient,
    "layer_norm": layer_norm,
    "layer_norm_gradient": layer_norm_gradient,
    "dense_residual": dense_residual,
    "dense_residual_gradient": dense_residual_gradient,
    "attention": attention,
    "attention_gradient": attention_gradient,
}

"""The kernels on TPUs, called as `block` and `kernel_pass` do: with maps [batch, ...] and ungrouped matrices.

Each function takes arrays of the batch, then parameters; it returns results for each image, then sums over all images.
The arrays of a gradient of `block` are x, its moments, keep; y, its moments; and the gradients of these two.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
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
_Weights = tuple[Float[Array, "c hidden"], Float[Array, " hidden"], Float[Array, "hidden c"], Float[Array, " c"]]


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


def _run(
    kernel: Callable[..., Any], kernels: Kernels, _: int, batched: Any, parameters: tuple[Array | None, Any]
) -> tuple[Any, tuple[()]]:
    """The map that `kernel` computes from maps without groups of pixels, as `kernel_pass` calls it.

    Args:
        kernel: of the second paper's blocks.
        kernels: with the mesh.
        batched: a tree of maps [b, h, w, c] and of numbers for each image.
        parameters: epsilon of a norm or None, and a tree of arrays. Matrices are cast to bfloat16, vectors to float32.
    """
    return _map_and_sums(kernel, kernels, batched, parameters)[0], ()


def _run_gradient(
    kernel: Callable[..., Any], kernels: Kernels, _: int, batched: Any, parameters: tuple[Array | None, Any]
) -> tuple[tuple[_Map], Any]:
    """The gradients by the first map and by the parameters; the arguments are those of `_run`."""
    dx, sums = _map_and_sums(kernel, kernels, batched, parameters)
    return (dx,), jax.tree.unflatten(jax.tree.structure(parameters[1]), jax.tree.leaves(sums))


def _map_and_sums(
    kernel: Callable[..., Any], kernels: Kernels, batched: Any, parameters: tuple[Array | None, Any]
) -> tuple[Any, Any]:
    arrays = jax.tree.leaves(batched)
    y, _, sums = kernels.run_on_shards(
        partial(kernel, interpret=kernels.interpret),
        tuple(positions_first(array, 1) for array in arrays if array.ndim == 4),
        tuple(array for array in arrays if array.ndim == 1),
        tuple(array.astype(jnp.bfloat16 if array.ndim == 2 else jnp.float32) for array in jax.tree.leaves(parameters)),
        batch_axis=2,
    )
    return batch_first(y, 1), sums


def _dense_residual_gradient(
    kernels: Kernels, _: int, batched: Any, parameters: tuple[None, Any]
) -> tuple[tuple[_Map, Float[Array, "b h w hidden"]], Any]:
    (_, hidden), (keep,), (dy,) = batched
    (dhidden,), dparameters = _run_gradient(tpu_dense_residual.backward, kernels, 1, (dy, hidden, keep), parameters)
    return (dy, dhidden), dparameters


def _attention(
    kernel: Callable[..., Any], kernels: Kernels, _: int, batched: Any, __: tuple[None, tuple[()]]
) -> tuple[Any, tuple[()]]:
    """What `kernel` computes of queries, keys and values, each [batch, heads, channels of a head, positions]."""
    heads = tuple(jax.tree.leaves(batched))
    return kernels.run_on_shards(partial(kernel, interpret=kernels.interpret), heads, (), (), batch_axis=0)[0], ()


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
    "depthwise_convolution": partial(_run, tpu_depthwise.forward),
    "depthwise_gradient": partial(_run_gradient, tpu_depthwise.backward),
    "norm_mlp_residual": partial(_run, tpu_norm_mlp.forward),
    "norm_mlp_gradient": partial(_run_gradient, tpu_norm_mlp.backward),
    "norm_dense": partial(_run, tpu_norm_dense.forward),
    "norm_dense_gradient": partial(_run_gradient, tpu_norm_dense.backward),
    "layer_norm": partial(_run, tpu_norm.forward),
    "layer_norm_gradient": partial(_run_gradient, tpu_norm.backward),
    "dense_residual": partial(_run, tpu_dense_residual.forward),
    "dense_residual_gradient": _dense_residual_gradient,
    "attention": partial(_attention, tpu_attention.forward),
    "attention_gradient": partial(_attention, tpu_attention.backward),
}

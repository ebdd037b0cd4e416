"""The passes on random inputs of a stage's size, with kernels or by XLA, for their comparison in `verification`."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array

from poolformer_jax.network.functional import EPSILON, gelu
from poolformer_jax.network.fused import block
from poolformer_jax.network.fused.depthwise_convolution import convolve_depthwise
from poolformer_jax.network.fused.kernels.base import GPU_ROWS, POOL_SIZE, TPU_IMAGES, Kernels, Pass
from poolformer_jax.network.fused.layers import (
    NormDenseWeights,
    dense_residual,
    layer_norm_and_input,
    norm_dense,
    norm_mlp_residual,
)
from poolformer_jax.network.fused.self_attention import attend_heads
from poolformer_jax.network.fused.statistics import Moments, moments_of
from poolformer_jax.network.parameter_table import HEAD_DIM

Branch = Literal["pooling", "mlp", "sep_conv", "norm_mlp", "layer_norm", "attention"]
"""What kernels compute of a stage: PoolFormer's two branches; a sep_conv mixer, the MLP branch of the second paper,
layer norms and attention."""

_WINDOW, EXPANSION = 7, 2  # of depthwise convolutions: the window's side, and channels per channel of the stage


class StageShape(NamedTuple):
    """The feature maps of a stage, the hidden layer of its MLPs, and the parts of its blocks that kernels may compute.

    Attributes:
        height: of the maps.
        width: of the maps.
        channels: of the maps; a depthwise convolution has twice as many.
        hidden_features: channels of the hidden layer.
        branches: the parts of a block.
    """

    height: int
    width: int
    channels: int
    hidden_features: int
    branches: tuple[Branch, ...] = ("pooling", "mlp")


class SepConvInputs(NamedTuple):
    """What the passes of a sep_conv mixer take: feature maps, maps after its first layer, parameters and gradients."""

    x: Array
    dx: Array
    hidden: Array
    dhidden: Array
    keep: Array
    weights: NormDenseWeights
    kernel: Array
    dense: tuple[Array, Array]


class BlockInputs(NamedTuple):
    """What all passes of a stage take: feature maps and parameters, and for the gradients an output's cotangents."""

    x: Array
    y: Array
    keep: Array
    gain: Array
    weights: block.MlpWeights
    cotangents: tuple[Array, Moments]


def images_per_device(stage: StageShape) -> int:
    """The smallest number of images per device that every kernel supports, and that fills a GPU kernel's tiles."""
    return math.lcm(TPU_IMAGES, 2 * GPU_ROWS // math.gcd(2 * GPU_ROWS, stage.height * stage.width))


def random_inputs(stage: StageShape, branch: Branch, mesh: Mesh) -> BlockInputs | SepConvInputs:
    """Inputs of ordinary size; every device gets the same images."""
    height, width, channels, hidden, _ = stage
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    def batch(array: np.ndarray) -> Array:
        repeated = np.concatenate([array] * mesh.size)
        sharded: Array = jax.device_put(repeated, NamedSharding(mesh, P(mesh.axis_names)))
        return sharded

    images = images_per_device(stage)

    def random_map(channels: int) -> Array:
        return batch(normal(images, height, width, channels).astype(jnp.bfloat16))

    if branch == "sep_conv":
        wide = EXPANSION * channels
        x, dx, hidden_map, dhidden = (random_map(size) for size in (channels, channels, wide, wide))
        keep = batch(rng.choice([0, 1.25], images).astype(np.float32))
        first = normal(channels, wide) / np.sqrt(channels, dtype=np.float32), *(normal(wide) for _ in range(3))
        last = normal(wide, channels) / np.sqrt(wide, dtype=np.float32), normal(channels)
        first, kernel, last = jax.device_put((first, normal(_WINDOW, _WINDOW, 1, wide), last), NamedSharding(mesh, P()))
        return SepConvInputs(x, dx, hidden_map, dhidden, keep, NormDenseWeights(*first), kernel, last)
    x, y, dy = (random_map(channels) for _ in range(3))
    keep = batch(rng.choice([0, 1.25], images).astype(np.float32))
    dmoments = Moments(batch(normal(images)), batch(normal(images)))
    parameters = (
        normal(channels),
        normal(channels, hidden) / np.sqrt(channels, dtype=np.float32),
        normal(hidden),
        normal(hidden, channels) / np.sqrt(hidden, dtype=np.float32),
        normal(channels),
    )
    gain, *weights = jax.device_put(parameters, NamedSharding(mesh, P()))
    return BlockInputs(x, y, keep, gain, block.MlpWeights(*weights), (dy, dmoments))


def run_pass(name: Pass, kernels: Kernels | None, inputs: BlockInputs | SepConvInputs) -> Any:
    """The results of a pass, without those that are constants; `kernels` is None to compute it by XLA."""
    if isinstance(inputs, BlockInputs) and name.startswith(("pooling", "mlp")):
        return _run_branch(name, kernels, inputs)
    function, arguments, cotangents = _second_paper(name, kernels, inputs)
    # The compiler removes the forward pass, whose result a gradient does not need.
    return jax.vjp(function, *arguments)[1](cotangents) if name.endswith("gradient") else function(*arguments)


def _run_branch(name: Pass, kernels: Kernels | None, inputs: BlockInputs) -> Any:
    x, y, keep, gain, weights, cotangents = inputs
    x_moments = moments_of(x)
    if name == "pooling_residual":
        return block.pooling_residual(POOL_SIZE, x, x_moments, gain, keep, kernels)
    if name == "mlp_residual":
        return block.mlp_residual(gelu, x, x_moments, weights, keep, kernels)
    batch, outputs = (x, x_moments, keep), (y, moments_of(y))
    if name == "pooling_gradient":
        dx, dmoments, dgain, _ = block.pooling_gradient(POOL_SIZE, kernels, (batch, gain, outputs), cotangents)
        return dx, dmoments.variance, dgain  # the gradient of the mean is zero
    return block.mlp_gradient(gelu, kernels, (batch, weights, outputs, ()), cotangents)[:3]


def _second_paper(
    name: Pass, kernels: Kernels | None, inputs: BlockInputs | SepConvInputs
) -> tuple[Callable[..., Any], tuple[Any, ...], Any]:
    """A pass of the second paper as a function, with its arguments and the cotangents of its results."""
    if isinstance(inputs, SepConvInputs):
        x, dx, hidden, dhidden, keep, sep_conv_weights, kernel, dense = inputs
        if name.startswith("dense_residual"):
            return lambda *parts: dense_residual(kernels, x, parts[0], keep, parts[1]), (hidden, dense), dx
        if name.startswith("norm_dense"):
            return partial(norm_dense, kernels, EPSILON), (x, sep_conv_weights), (dhidden, dx)
        return partial(convolve_depthwise, kernels=kernels), (hidden, kernel), dhidden
    x, y, keep, gain, weights, (dy, _) = inputs
    if name.startswith("attention"):
        images, height, width, _ = x.shape
        query, key = (z.swapaxes(1, 3).reshape(images, -1, HEAD_DIM, height * width) for z in (x, y))
        return partial(attend_heads, kernels), (query, key, query), key
    if name.startswith("layer_norm"):
        return partial(layer_norm_and_input, kernels, EPSILON), (x, (gain, weights.bias2)), (dy, y)
    return lambda *parts: norm_mlp_residual(kernels, EPSILON, parts[0], keep, parts[1]), (x, (gain, weights)), dy

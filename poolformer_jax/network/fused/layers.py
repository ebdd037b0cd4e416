"""The layers of the second paper's blocks in the passes that kernels on a TPU compute.

`kernels` compute a pass on their platform, and must support it; without them XLA computes it.
"""

from typing import NamedTuple

from jaxtyping import Array, Float

from poolformer_jax.network import functional
from poolformer_jax.network.functional import over_channels, widen
from poolformer_jax.network.fused.block import MlpWeights
from poolformer_jax.network.fused.kernel_pass import KernelPass, run
from poolformer_jax.network.fused.kernels.base import Kernels
from poolformer_jax.network.fused.statistics import broadcast_over_map

_Map = Float[Array, "b h w c"]
_Hidden = Float[Array, "b h w hidden"]
_PerImage = Float[Array, " b"]
_PerChannel = Float[Array, " c"]
_PerHidden = Float[Array, " hidden"]
_relu2 = functional.ACTIVATIONS["relu2"]


def layer_norm(kernels: Kernels | None, epsilon: float, x: _Map, parameters: tuple[_PerChannel, _PerChannel]) -> _Map:
    """`functional.layer_norm` of a feature map, with `parameters` gain and shift."""
    y: Array = run(_layer_norm(epsilon), kernels, (x,), (), parameters)
    return y


def layer_norm_and_input(
    kernels: Kernels | None, epsilon: float, x: _Map, parameters: tuple[_PerChannel, _PerChannel]
) -> tuple[_Map, _Map]:
    """`layer_norm`, and `x`: the gradient rule adds the gradient of another use of `x`, in the same pass."""
    y, x = run(_layer_norm(epsilon)._replace(returns_input=True), kernels, (x,), (), parameters)
    return y, x


def _layer_norm(epsilon: float) -> KernelPass:
    return KernelPass("layer_norm", "layer_norm_gradient", functional.layer_norm, epsilon)


class NormDenseWeights(NamedTuple):
    """A dense layer with the norm's gain and shift folded in, and StarReLU's numbers for each channel; float32."""

    kernel: Float[Array, "c hidden"]
    bias: _PerHidden
    scale: _PerHidden
    shift: _PerHidden


def norm_dense(kernels: Kernels | None, epsilon: float, x: _Map, weights: NormDenseWeights) -> tuple[_Hidden, _Map]:
    """`scale * relu(dense((x - mean) / std))² + shift`, with mean and std of each position; and `x`.

    This is the start of a sep_conv mixer, up to its convolution. `x` is as in `layer_norm_and_input`.
    """
    this = KernelPass("norm_dense", "norm_dense_gradient", _norm_dense, epsilon, returns_input=True)
    hidden, x = run(this, kernels, (x,), (), (weights,))
    return hidden, x


def _norm_dense(x: _Map, weights: NormDenseWeights, epsilon: float) -> _Hidden:
    squares = _relu2(functional.dense(functional.standardize(x, (-1,), epsilon), weights.kernel, weights.bias))
    return squares * over_channels(weights.scale, squares) + over_channels(weights.shift, squares)


def dense_residual(
    kernels: Kernels | None,
    x: _Map,
    hidden: _Hidden,
    keep: _PerImage,
    parameters: tuple[Float[Array, "hidden c"], _PerChannel],
) -> _Map:
    """`x + keep * dense(hidden)`, the end of a sep_conv mixer, after its convolution.

    `keep` is drop path's factor for each image, 1 without drop path; `parameters` are kernel and bias.
    """
    this = KernelPass("dense_residual", "dense_residual_gradient", _dense_residual)
    y: Array = run(this, kernels, (x, hidden), (keep,), parameters)
    return y


def _dense_residual(
    x: _Map, hidden: _Hidden, keep: _PerImage, kernel: Float[Array, "hidden c"], bias: _PerChannel
) -> _Map:
    branch = widen(functional.dense(hidden, kernel, bias)) * broadcast_over_map(keep)
    return (widen(x) + branch).astype(x.dtype)


def norm_mlp_residual(
    kernels: Kernels | None, epsilon: float, x: _Map, keep: _PerImage, parameters: tuple[_PerChannel, MlpWeights]
) -> _Map:
    """`trunk * x + keep * dense2(relu(dense1((x - mean) / std))²)`, with mean and std of each position.

    `keep` is as in `dense_residual`; `parameters` are the trunk's factor for each channel, and the dense layers with
    norm and StarReLU folded in.
    """
    this = KernelPass("norm_mlp_residual", "norm_mlp_gradient", _norm_mlp_residual, epsilon)
    y: Array = run(this, kernels, (x,), (keep,), parameters)
    return y


def _norm_mlp_residual(x: _Map, keep: _PerImage, trunk: _PerChannel, weights: MlpWeights, epsilon: float) -> _Map:
    standard = functional.standardize(x, (-1,), epsilon)
    hidden = _relu2(functional.dense(standard, weights.kernel1, weights.bias1))
    branch = functional.dense(hidden, weights.kernel2, weights.bias2)
    return (widen(x) * over_channels(trunk, widen(x)) + widen(branch) * broadcast_over_map(keep)).astype(x.dtype)

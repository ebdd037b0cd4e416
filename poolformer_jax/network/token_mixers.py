"""Token mixers: functions of the config, the mixer's parameters, and a normalised feature map.

The papers claim that this choice matters little, and compare these mixers. To add a mixer, add a function to
`TOKEN_MIXERS` and its parameters to `parameter_table.MIXER_PARAMETERS`.
Sources: arXiv 2111.11418, Section 4.3; sail-sg/poolformer, models/metaformer.py; arXiv 2210.13452;
sail-sg/metaformer, metaformer_baselines.py.
"""

from collections.abc import Callable
from functools import partial

from jaxtyping import Array, Float

from poolformer_jax.network import functional
from poolformer_jax.network.config import PoolFormerConfig
from poolformer_jax.network.functional import depthwise_convolution, pooling_mixer, star_relu
from poolformer_jax.network.fused import Kernels, convolve_depthwise, dense as fused_dense, self_attention
from poolformer_jax.network.layers import Params
from poolformer_jax.network.parameter_table import HEAD_DIM

_Map = Float[Array, "b h w c"]


def pooling(config: PoolFormerConfig, _: Params, x: _Map) -> _Map:
    """Average pooling minus its input: PoolFormer's mixer, without parameters."""
    return pooling_mixer(x, config.pool_size)


def identity(_: PoolFormerConfig, __: Params, x: _Map) -> _Map:
    """No communication between positions."""
    return x


def _attend(x: _Map, kernel: Float[Array, "c c3"], head_dim: int) -> _Map:
    return functional.attention(functional.dense(x, kernel), head_dim)


def attention(
    _: PoolFormerConfig,
    params: Params,
    x: _Map,
    attend: Callable[..., Array] = _attend,
    dense: Callable[..., Array] = functional.dense,
) -> _Map:
    """Multi-head self-attention over all positions; query, key and value have no bias."""
    return dense(attend(x, params["qkv"]["kernel"], HEAD_DIM), **params["proj"])


def spatial_fc(_: PoolFormerConfig, params: Params, x: _Map) -> _Map:
    """One dense layer over all positions, shared by the channels and without a bias; it fixes the input's size."""
    return functional.mix_positions(x, params["fc"]["kernel"])


def random(_: PoolFormerConfig, params: Params, x: _Map) -> _Map:
    """RandFormer's mixer: a matrix over the positions that is drawn once and never trained, shared by the channels."""
    return functional.mix_positions(x, params["random"]["kernel"])


def sep_conv(
    _: PoolFormerConfig,
    params: Params,
    x: _Map,
    dense: Callable[..., Array] = functional.dense,
    convolution: Callable[[Array, Array], Array] = depthwise_convolution,
) -> _Map:
    """ConvFormer's mixer: MobileNetV2's inverted separable convolution, 7 x 7, with StarReLU before the convolution.

    The zero padding follows the activation, so that it is of zeros and not of the activation's bias.
    """
    hidden = star_relu(dense(x, **params["pwconv1"]), **params["act1"])
    return dense(convolution(hidden, params["dwconv"]["kernel"]), **params["pwconv2"])


TOKEN_MIXERS: dict[str, Callable[[PoolFormerConfig, Params, Array], Array]] = {
    "pooling": pooling,
    "identity": identity,
    "attention": attention,
    "spatial_fc": spatial_fc,
    "random": random,
    "sep_conv": sep_conv,
}


def fused_token_mixers(kernels: Kernels | None) -> dict[str, Callable[[PoolFormerConfig, Params, Array], Array]]:
    """All mixers, some in a faster form that has no forward-mode derivative and may use `kernels`."""
    return TOKEN_MIXERS | {
        "attention": partial(attention, attend=partial(self_attention, kernels=kernels), dense=fused_dense),
        "sep_conv": partial(sep_conv, dense=fused_dense, convolution=partial(convolve_depthwise, kernels=kernels)),
    }

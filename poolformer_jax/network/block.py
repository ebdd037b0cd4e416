"""The block that all MetaFormers share (arXiv 2111.11418, Figure 2 and Equations 2 and 3; arXiv 2210.13452)."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from poolformer_jax.network.config import PoolFormerConfig
from poolformer_jax.network.functional import ACTIVATIONS, EPSILON, NORMS, dense, over_channels, wide_type, widen
from poolformer_jax.network.fused import (
    Branch,
    Kernels,
    MlpWeights,
    Moments,
    NormDenseWeights,
    Pass,
    StageShape,
    convolve_depthwise,
    dense as fused_dense,
    dense_residual,
    fold_mlp,
    layer_norm_and_input,
    microbatched,
    mlp_residual,
    norm_dense,
    norm_mlp_residual,
    partition_spec,
    pooling_residual,
    with_auto_sharding,
)
from poolformer_jax.network.layers import DropPath, Params, declare
from poolformer_jax.network.parameter_table import BLOCK
from poolformer_jax.network.parameters import subtree
from poolformer_jax.network.token_mixers import TOKEN_MIXERS, fused_token_mixers

_Map = Float[Array, "b h w c"]
_DropPaths = tuple[Callable[[Array], Array], Callable[[Array], Array]]
_Keeps = tuple[Float[Array, " b"] | None, Float[Array, " b"] | None]


class MetaFormerBlock(nn.Module):
    """Two residual branches: the token mixer communicates between positions, the MLP works on each of them.

        x = residual_scale_1 * x + drop_path(layer_scale_1 * mixer(norm1(x)))
        x = residual_scale_2 * x + drop_path(layer_scale_2 * fc2(act(fc1(norm2(x)))))

    The config says which of the scales a stage has (PoolFormer: layer scales; the second paper: residual scales in the
    last two stages), which biases, and which mixer, norm and activation. `parameter_table` lists the parameters of each
    by path: `norm1`, `token_mixer`, `layer_scale_1`, `residual_scale_1`, `norm2`, `mlp/fc1`, `mlp/act`, `mlp/fc2`, ...
    They are in the collection "params", but for the matrix of a "random" mixer, which is in "constants".

    With `moments` the block runs in the passes of `fused`; without, as the paper writes it, and if `fused` is set a few
    images at a time on a CPU. All compute the same function. `can_fuse` says which blocks have fused passes.
    """

    config: PoolFormerConfig
    stage: int
    drop_path_rate: float = 0.0
    kernels: Kernels | None = None
    fused: bool = True

    @nn.compact
    def __call__(self, x: _Map, moments: Moments | None, train: bool) -> tuple[_Map, Moments | None]:
        config = self.config
        params = declare(self, subtree(config, BLOCK, self.stage))
        drop_path_1, drop_path_2 = (
            partial(DropPath(self.drop_path_rate, name=f"drop_path_{branch}"), train=train) for branch in (1, 2)
        )
        if moments is not None:
            return _fused_block(config, self.kernels, params, x, moments, (drop_path_1, drop_path_2))
        mixers = fused_token_mixers(self.kernels) if self.fused else TOKEN_MIXERS
        mixer = partial(mixers[config.token_mixers[self.stage]], config)
        if not self.fused or (train and config.dropout_rate):
            dropout = nn.Dropout(config.dropout_rate, deterministic=not train, name="dropout")
            x = _mixer_branch(config, mixer, params, x, drop_path_1)
            return _mlp_branch(config, params, x, drop_path_2, dropout, dense), None
        ones = jnp.ones(len(x), x.dtype)
        drops = train and self.drop_path_rate > 0
        keeps = (drop_path_1(ones), drop_path_2(ones)) if drops else (None, None)
        return _batched_block(config, mixer, params, x, keeps, self.kernels), None


def can_fuse(config: PoolFormerConfig, stage: int, train: bool) -> bool:
    """True if the blocks of a stage can be computed in the passes of `fused`.

    These are PoolFormer's, and PoolFormerV2's in the stages without residual scales.
    """
    pools = config.token_mixers[stage] == "pooling" and config.norm == "group_norm"
    scales = config.residual_scale_init_values
    plain_trunk = scales is None or scales[stage] is None
    return pools and plain_trunk and not (train and config.dropout_rate)


def kernel_stages(config: PoolFormerConfig, image_size: tuple[int, int], *, train: bool) -> list[StageShape]:
    """The shapes of the stages that kernels may compute, and the parts of their blocks.

    With dropout the blocks of a network in training are not fused.
    """
    heights, widths = map(config.feature_sizes, image_size)
    shapes = []
    for stage, shape in enumerate(map(StageShape, heights, widths, config.hidden_sizes, config.mlp_hidden_sizes)):
        if can_fuse(config, stage, train):
            branches: tuple[Branch, ...] = ("pooling", "mlp") if config.hidden_act != "star_relu" else ()
        else:
            has_kernel: dict[Branch, bool] = {
                "sep_conv": config.token_mixers[stage] == "sep_conv",
                "attention": config.token_mixers[stage] == "attention",
                "norm_mlp": _has_norm_mlp(config, train),
                "layer_norm": config.norm == "layer_norm",
            }
            branches = tuple(branch for branch, has in has_kernel.items() if has)
        if branches:
            shapes.append(shape._replace(branches=branches))
    return shapes


def _has_norm_mlp(config: PoolFormerConfig, train: bool) -> bool:
    """True if `norm_mlp_residual` is the MLP branch."""
    return config.norm == "layer_norm" and config.hidden_act == "star_relu" and not (train and config.dropout_rate)


def _mixer_branch(
    config: PoolFormerConfig,
    mixer: Callable[[Params, Array], Array],
    params: Params,
    x: _Map,
    drop_path: Callable[[Array], Array],
) -> _Map:
    normalized = NORMS[config.norm](x, **params["norm1"], epsilon=config.norm_epsilon)
    return _add_mixed(params, x, mixer(params.get("token_mixer", {}), normalized), drop_path)


def _add_mixed(params: Params, x: _Map, mixed: _Map, drop_path: Callable[[Array], Array]) -> _Map:
    return _scaled(params, "residual_scale_1", x) + drop_path(_scaled(params, "layer_scale_1", mixed))


def _mlp_branch(
    config: PoolFormerConfig,
    params: Params,
    x: _Map,
    drop_path: Callable[[Array], Array],
    dropout: Callable[[Array], Array],
    dense: Callable[..., Array],
) -> _Map:
    norm, mlp = partial(NORMS[config.norm], epsilon=config.norm_epsilon), params["mlp"]
    hidden = ACTIVATIONS[config.hidden_act](dense(norm(x, **params["norm2"]), **mlp["fc1"]), **mlp.get("act", {}))
    out = dropout(dense(dropout(hidden), **mlp["fc2"]))
    return _scaled(params, "residual_scale_2", x) + drop_path(_scaled(params, "layer_scale_2", out))


def _batched_block(
    config: PoolFormerConfig,
    mixer: Callable[[Params, Array], Array],
    params: Params,
    x: _Map,
    keeps: _Keeps,
    kernels: Kernels | None,
) -> _Map:
    """The plain block; on a CPU a few images at a time.

    There the gradient computes a few images again instead of reading what the forward pass saved: their maps are in the
    caches then, and XLA's matrix products are faster than the memory.

    `keeps` has drop path's factor for each image, for each branch; None without drop path. `kernels` compute the passes
    that they support, on their platform.
    """

    def compute(params: Params, x: _Map, keeps: _Keeps) -> _Map:
        drop_path_1, drop_path_2 = (partial(_scale_images, keep) for keep in keeps)
        if "dwconv" in params.get("token_mixer", {}) and supports(kernels, config, "norm_dense", x):
            hidden, x = norm_dense(kernels, config.norm_epsilon, x, _fold_sep_conv(params, wide_type(x.dtype)))
            hidden = convolve_depthwise(hidden, params["token_mixer"]["dwconv"]["kernel"], kernels)
            keep = jnp.ones(len(x), x.dtype) if keeps[0] is None else keeps[0]
            x = _scaled(params, "residual_scale_1", x)
            x = dense_residual(kernels, x, hidden, widen(keep), _fold_sep_conv_end(params, wide_type(x.dtype)))
        elif supports(kernels, config, "layer_norm", x):
            norm = params["norm1"]
            parameters = norm["scale"], norm.get("bias", jnp.zeros_like(norm["scale"]))
            normalized, x = layer_norm_and_input(kernels, config.norm_epsilon, x, parameters)
            x = _add_mixed(params, x, mixer(params.get("token_mixer", {}), normalized), drop_path_1)
        else:
            x = _mixer_branch(config, mixer, params, x, drop_path_1)
        hidden_features = params["mlp"]["fc1"]["kernel"].shape[1]
        if _has_norm_mlp(config, train=False) and supports(kernels, config, "norm_mlp_residual", x, hidden_features):
            keep = jnp.ones(len(x), x.dtype) if keeps[1] is None else keeps[1]
            trunk = params.get("residual_scale_2", {"scale": jnp.ones(x.shape[-1])})["scale"]
            weights = trunk, _fold_mlp(params, wide_type(x.dtype))
            return norm_mlp_residual(kernels, config.norm_epsilon, x, widen(keep), weights)
        return _mlp_branch(config, params, x, drop_path_2, lambda x: x, fused_dense)

    def on_cpu(params: Params, x: _Map, keeps: _Keeps) -> _Map:
        some_images = jax.checkpoint(lambda images: compute(params, *images))
        y: Array
        y, _ = microbatched(lambda images: (some_images(images), ()), (x, keeps))
        return y

    run = partial(lax.platform_dependent, cpu=on_cpu, default=compute)
    y: Array = with_auto_sharding(run, params, x, keeps, specs=PartitionSpec(*partition_spec(x)))
    return y


def supports(
    kernels: Kernels | None, config: PoolFormerConfig, name: Pass, x: _Map, hidden_features: int | None = None
) -> bool:
    """True if `kernels` compute pass `name`, one of those with a layer norm, of maps like `x`."""
    return (
        kernels is not None
        and config.norm == "layer_norm"
        and kernels.supports(name, x.shape, x.dtype, hidden_features)
    )


def _scale_images(factors: Float[Array, " b"] | None, x: _Map) -> _Map:
    return x if factors is None else x * factors[:, None, None, None]


def _scaled(params: Params, name: str, x: _Map) -> _Map:
    """`x` times a learnt factor for each channel, where the network has one of this name.

    Layer scale is for a residual branch (arXiv 2103.17239), residual scale for the trunk (arXiv 2110.09456).
    """
    return x * over_channels(params[name]["scale"], x) if name in params else x


def _fused_block(
    config: PoolFormerConfig, kernels: Kernels | None, params: Params, x: _Map, moments: Moments, drop_paths: _DropPaths
) -> tuple[_Map, Moments]:
    wide = wide_type(x.dtype)
    scale1 = params.get("layer_scale_1", {"scale": jnp.ones(x.shape[-1])})["scale"]
    # Drop path of ones gives its factor for each image.
    keep1, keep2 = (drop_path(jnp.ones(len(x), wide)) for drop_path in drop_paths)

    # norm1's bias has no effect: it is constant over the image, and the mixer subtracts it again.
    gain = params["norm1"]["scale"].astype(wide) * scale1.astype(wide)
    x, moments = pooling_residual(config.pool_size, x, _with_epsilon(config, moments), gain, keep1, kernels)
    activation = ACTIVATIONS["relu2" if config.hidden_act == "star_relu" else config.hidden_act]
    weights = _fold_mlp(params, wide)
    return mlp_residual(activation, x, _with_epsilon(config, moments), weights, keep2, kernels)


def _fold_sep_conv(params: Params, dtype: Dtype) -> NormDenseWeights:
    """A sep_conv mixer's first layer with norm1 folded in, and StarReLU's numbers for each channel."""
    norm, dense, act = params["norm1"], params["token_mixer"]["pwconv1"], params["token_mixer"]["act1"]
    kernel = dense["kernel"].astype(dtype)
    bias = norm["bias"].astype(dtype) @ kernel if "bias" in norm else jnp.zeros(kernel.shape[1], dtype)
    bias = bias + dense["bias"] if "bias" in dense else bias
    scale, shift = (jnp.broadcast_to(act[name].astype(dtype), bias.shape) for name in ("scale", "bias"))
    return NormDenseWeights(norm["scale"].astype(dtype)[:, None] * kernel, bias, scale, shift)


def _fold_sep_conv_end(params: Params, dtype: Dtype) -> tuple[Float[Array, "hidden c"], Float[Array, " c"]]:
    """Kernel and bias of a sep_conv mixer's last layer with the layer scale folded in."""
    dense = params["token_mixer"]["pwconv2"]
    kernel = dense["kernel"].astype(dtype)
    bias = dense.get("bias", jnp.zeros(kernel.shape[1])).astype(dtype)
    scale = params["layer_scale_1"]["scale"].astype(dtype) if "layer_scale_1" in params else 1
    return kernel * scale, bias * scale


def _fold_mlp(params: Params, dtype: Dtype) -> MlpWeights:
    """The MLP's layers with norm2, StarReLU and the layer scale folded in."""
    norm, mlp = params["norm2"], params["mlp"]
    fc1, fc2 = mlp["fc1"], fold_star_relu(mlp["act"], mlp["fc2"]) if "act" in mlp else mlp["fc2"]
    channels, hidden_features = fc1["kernel"].shape
    return fold_mlp(
        norm["scale"],
        norm.get("bias", jnp.zeros(channels)),
        fc1["kernel"],
        fc1.get("bias", jnp.zeros(hidden_features)),
        fc2["kernel"],
        fc2.get("bias", jnp.zeros(channels)),
        params["layer_scale_2"]["scale"] if "layer_scale_2" in params else jnp.ones(channels),
        dtype=dtype,
    )


def _with_epsilon(config: PoolFormerConfig, moments: Moments) -> Moments:
    """Moments for which the passes, whose epsilon is `EPSILON`, compute norms with the config's epsilon."""
    if config.norm_epsilon == EPSILON:
        return moments
    return Moments(moments.mean, moments.variance + (config.norm_epsilon - EPSILON))


def fold_star_relu(act: Params, dense: Params) -> Params:
    """The dense layer after a StarReLU `scale * r + bias`, with scale and bias folded in: it takes `r = relu(x)²`."""
    kernel = dense["kernel"]
    bias = act["bias"] * kernel.sum(0)
    return {"kernel": act["scale"] * kernel, "bias": bias + dense["bias"] if "bias" in dense else bias}

"""The folded network on one image, computed by several devices together, as tensor parallelism does it.

Every device has all of every feature map. Of a convolution it computes some of the channels, of an MLP some of the
hidden layer (arXiv 1909.08053, Section 3), with that part of the weights. So no two devices multiply by the same
weights, which are most of what is read where maps are small, and they meet once in a convolution and once in a block.
What lies between is little, and every device computes it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from poolformer_jax.config import PoolFormerConfig
from poolformer_jax.folding import (
    FoldedParams,
    block_names,
    convolve,
    dense,
    folded_head,
    mix_tokens,
    norm_axes,
)
from poolformer_jax.functional import ACTIVATIONS, standardize
from poolformer_jax.model import Pixels, check_pixel_values


def shares(folded: FoldedParams, axis: str) -> Any:
    """How devices along a mesh axis hold the parameters: a tree of PartitionSpecs."""
    every, first, second = P(), P(axis), P(None, axis)  # type: ignore[no-untyped-call]
    channels = P(None, None, None, axis)  # type: ignore[no-untyped-call]

    def spec(path: tuple[Any, ...], _: Array) -> P:
        match [entry.key for entry in path][-2:]:
            case ["stem" | "downsample", "kernel"]:
                return channels
            case ["fc1", "kernel"]:
                return second
            case ["stem" | "downsample" | "fc1", "bias"] | ["fc2", "kernel"]:
                return first
            case _:
                return every

    return jax.tree_util.tree_map_with_path(spec, folded)


def shared_apply(
    share: FoldedParams, config: PoolFormerConfig, pixel_values: Pixels, axis: str, dtype: Dtype = jnp.float32
) -> Float[Array, "b labels"]:
    """`folding.folded_apply` inside a `shard_map`: from all of the pixels, on each device, to all of the logits.

    Args:
        share: a device's part of the folded parameters, as `shares` says.
        config: the architecture.
        pixel_values: [batch, height, width, num_channels], normalised; the batch is meant to be small.
        axis: the mesh axis.
        dtype: type that feature maps are computed in; the statistics and the head always use float32.
    """
    check_pixel_values(config, pixel_values.shape)
    x = _convolve(share["stem"], config, 0, jnp.asarray(pixel_values).astype(dtype), axis)
    for index, depth in enumerate(config.depths):
        stage = share[f"stages_{index}"]
        if index > 0:
            x = _convolve(stage["downsample"], config, index, x, axis)
        if "position_embedding" in stage:
            x = x + stage["position_embedding"].astype(dtype)
        for name in block_names(depth):
            x = mix_tokens(stage[name]["token_mixer"], config, config.token_mixers[index], x)
            x = _mix_channels(stage[name]["mlp"], config, x, axis)
    return folded_head(share, config, x)


def _convolve(
    share: FoldedParams, config: PoolFormerConfig, index: int, x: Float[Array, "b h w c"], axis: str
) -> Float[Array, "b h2 w2 c2"]:
    """The convolution before the blocks of a stage; a device has some of the kernels."""
    y: Array = lax.all_gather(convolve(share, config, index, x), axis, axis=3, tiled=True)
    return y


def _mix_channels(
    share: FoldedParams, config: PoolFormerConfig, x: Float[Array, "b h w c"], axis: str
) -> Float[Array, "b h w c"]:
    """The second residual branch and its input; a device has some of the hidden channels."""
    hidden = ACTIVATIONS[config.hidden_act](dense(share["fc1"], standardize(x, norm_axes(config))))
    branch = lax.psum(hidden @ share["fc2"]["kernel"].astype(x.dtype), axis)  # type: ignore[no-untyped-call]
    y: Array = x + (branch + share["fc2"]["bias"].astype(x.dtype))
    return y

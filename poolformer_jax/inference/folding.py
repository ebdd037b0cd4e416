"""The same network for inference, with every constant factor multiplied into a matrix beforehand.

Exact algebra, no approximation; only the rounding of float32 differs. Write a norm as `n * gain + shift` where
`n = (x - mean) / std` has no parameters, and `s` for a layer scale (1 where the network has none). All of these are
vectors over channels, so each commutes with everything that treats channels alike.

1. Pooling branch: `s * (pool(n * gain + shift) - (n * gain + shift))`. The pooling mean counts only pixels inside the
   image, so the mean of a constant is that constant: `pool(shift) - shift = 0`, and shift is gone.
2. `gain` is the same at every position, hence `pool(n * gain) = pool(n) * gain`: one vector `s * gain` is left.
3. Group norm only: mean and std are one number per image. The mean is a constant again and cancels as shift did, and
   1 / std moves out: the branch is `(s * gain / std) * (pool(x) - x)`. No normalised map is ever written.
4. Identity branch: `s * (n * gain + shift) = n * (s * gain) + s * shift`.
5. Other mixers stay as they are between their norm and their layer scale.
6. First MLP layer: `(n * gain + shift) @ K + b = n @ (gain[:, None] * K) + (shift @ K + b)`.
7. Second MLP layer: `s * (h @ K + b) = h @ (K * s) + b * s`.
8. Head: averaging over positions commutes with `* gain + shift`, which then goes into the head's kernel and bias as
   in 6. With one group, `mean(n) = (mean over positions of x - mean) / std`: the map is not normalised either.
   Without a head (num_labels=0) gain and shift are applied to the pooled vector.

Line 3 reads as in Section 3.2 of arXiv 2111.11418; the rest is common practice for batch norm (arXiv 1712.05877,
Section 3.2), which here works for norms that depend on the image because their statistics are left where they are.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Float

from poolformer_jax.network.config import PoolFormerConfig
from poolformer_jax.network.functional import (
    ACTIVATIONS,
    POOLED_EPSILON,
    distance_and_inverse_std,
    over_channels,
    pooling_mixer,
    standardize,
    widen,
)
from poolformer_jax.network.fused.cpu_batching import largest_divisor
from poolformer_jax.network.model import Pixels, check_pixel_values
from poolformer_jax.network.parameters import check_variables
from poolformer_jax.network.token_mixers import TOKEN_MIXERS

# Nested dictionaries of float32 arrays; `fold` says which.
FoldedParams = dict[str, Any]


def fold(config: PoolFormerConfig, variables: Mapping[str, Any]) -> FoldedParams:
    """The folded parameters of a `PoolFormerForImageClassification`, computed in float64 and rounded once.

    Args:
        config: the architecture.
        variables: `{"params": tree}` as `model.init` or `load_pretrained` gives it.

    Returns:
        `stem` and `stages_{s}/downsample` {kernel, bias}; `stages_{s}/position_embedding` where there is one;
        `stages_{s}/blocks_{b}/mlp/fc1`, `fc2` {kernel, bias} and `token_mixer`: {scale} for pooling, {scale, shift} for
        identity, {norm, mixer, scale} for the others; `head` {kernel, bias}, or `norm` {scale, bias} without labels.

    Raises:
        WeightsMismatch: if the variables are not those of such a network.
    """
    check_variables(config, variables)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), jax.device_get(dict(variables["params"])))
    folded: FoldedParams = {"stem": params["stem"]["conv"]}
    for index, depth in enumerate(config.depths):
        stage = params[f"stages_{index}"]
        folded[f"stages_{index}"] = {
            **({"downsample": stage["downsample"]["conv"]} if index > 0 else {}),
            **{name: stage[name] for name in ("position_embedding",) if name in stage},
            **{name: _fold_block(config.token_mixers[index], stage[name]) for name in _block_names(depth)},
        }
    if config.num_labels:
        folded["head"] = _fold_affine(params["norm"], params["head"])
    else:
        folded["norm"] = params["norm"]
    rounded: FoldedParams = jax.device_put(jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), folded))
    return rounded


def _block_names(depth: int) -> list[str]:
    """The names of a stage's blocks, first to last."""
    return [f"blocks_{number}" for number in range(depth)]


def _fold_block(mixer: str, block: Mapping[str, Any]) -> FoldedParams:
    ones = np.ones_like(block["norm1"]["scale"])
    scale_1, scale_2 = (block.get(f"layer_scale_{branch}", {"scale": ones})["scale"] for branch in (1, 2))
    norm, fc2 = block["norm1"], block["mlp"]["fc2"]
    match mixer:
        case "pooling":  # lines 1 and 2
            token_mixer = {"scale": scale_1 * norm["scale"]}
        case "identity":  # line 4
            token_mixer = {"scale": scale_1 * norm["scale"], "shift": scale_1 * norm["bias"]}
        case _:  # line 5
            token_mixer = {"norm": norm, "mixer": block.get("token_mixer", {}), "scale": scale_1}
    return {
        "token_mixer": token_mixer,
        "mlp": {
            "fc1": _fold_affine(block["norm2"], block["mlp"]["fc1"]),
            "fc2": {"kernel": fc2["kernel"] * scale_2, "bias": fc2["bias"] * scale_2},  # line 7
        },
    }


def _fold_affine(norm: Mapping[str, Any], dense: Mapping[str, Any]) -> FoldedParams:
    """Line 6: a norm's gain and shift, taken into the dense layer that follows it."""
    kernel = dense["kernel"]
    return {"kernel": norm["scale"][:, None] * kernel, "bias": norm["bias"] @ kernel + dense["bias"]}


def folded_apply(
    config: PoolFormerConfig,
    folded: FoldedParams,
    pixel_values: Pixels,
    dtype: Dtype = jnp.float32,
    *,
    images_at_once: int | None = None,
) -> Float[Array, "b labels"]:
    """The logits of `PoolFormerForImageClassification(config, dtype)` with train=False, in float32.

    Args:
        config: the architecture.
        folded: what `fold` returns.
        pixel_values: [batch, height, width, num_channels], normalised.
        dtype: type that feature maps are computed in; the statistics and the head always use float32.
        images_at_once: work through the batch in equal parts of at most so many images; None does all at once.
            `cpu_devices.images_on_device(mesh)` is fast.
    """
    if images_at_once is not None and len(pixel_values) > images_at_once:
        size = largest_divisor(len(pixel_values), images_at_once)
        parts = jnp.reshape(pixel_values, (-1, size, *pixel_values.shape[1:]))
        apply = partial(folded_apply, config, folded, dtype=dtype)
        logits: Float[Array, "parts n labels"] = lax.map(apply, parts)
        return logits.reshape(len(pixel_values), -1)
    return folded_head(config, folded, folded_features(config, folded, pixel_values, dtype)[-1])


def folded_features(
    config: PoolFormerConfig, folded: FoldedParams, pixel_values: Pixels, dtype: Dtype = jnp.float32
) -> tuple[Float[Array, "b _h _w _c"], ...]:
    """The feature map of every stage: the `hidden_states` of the model. The arguments are those of `folded_apply`.

    Raises:
        ValueError: for an input that the model refuses too.
    """
    check_pixel_values(config, pixel_values.shape)
    x = _convolve(config, 0, folded["stem"], jnp.asarray(pixel_values).astype(dtype))
    hidden_states = []
    for index, depth in enumerate(config.depths):
        stage = folded[f"stages_{index}"]
        if index > 0:
            x = _convolve(config, index, stage["downsample"], x)
        if "position_embedding" in stage:
            x = x + stage["position_embedding"][None].astype(dtype)
        for name in _block_names(depth):
            x = _mix_tokens(config, config.token_mixers[index], stage[name]["token_mixer"], x)
            x = _mix_channels(config, stage[name]["mlp"], x)
        hidden_states.append(x)
    return tuple(hidden_states)


def folded_head(
    config: PoolFormerConfig, folded: FoldedParams, features: Float[Array, "b h w c"]
) -> Float[Array, "b labels"]:
    """The logits for the last feature map; with num_labels=0 the pooled, normalised features."""
    features = widen(features)
    if config.head_order == "pool_norm":
        pooled = standardize(features.mean((1, 2)), (-1,), POOLED_EPSILON)
    elif config.norm == "group_norm":  # line 8
        _, inverse_std = distance_and_inverse_std(features, (1, 2, 3))
        pooled = (features.mean((1, 2)) - features.mean((1, 2, 3))[:, None]) * inverse_std[:, 0, 0]
    else:
        pooled = standardize(features, (-1,)).mean((1, 2))
    if "head" in folded:
        return _dense(folded["head"], pooled)
    gain, shift = (over_channels(folded["norm"][name], pooled) for name in ("scale", "bias"))
    return pooled * gain + shift


def _convolve(
    config: PoolFormerConfig, index: int, conv: Mapping[str, Array], x: Float[Array, "b h w c"]
) -> Float[Array, "b h2 w2 c2"]:
    """The convolution before the blocks of a stage."""
    stride, padding = config.strides[index], config.padding[index]
    kernel = conv["kernel"].astype(x.dtype)
    convolution = partial(
        lax.conv_general_dilated,
        window_strides=(stride, stride),
        padding=[(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    positions: Any = x.shape[0] * x.shape[1] * x.shape[2] // stride**2  # about as many; unknown in exported programs
    if isinstance(positions, int) and positions < kernel.shape[-1]:
        product = partial(_convolve_patches, stride=stride, padding=padding)
        y: Array = lax.platform_dependent(x, kernel, cpu=product, default=convolution)
    else:
        y = convolution(x, kernel)
    return y + over_channels(conv["bias"], y)


def _convolve_patches(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k c d"], stride: int, padding: int
) -> Float[Array, "b h2 w2 d"]:
    """A convolution as one matrix product: on a CPU faster than XLA's for fewer positions than channels."""
    size = len(kernel)
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows, columns = (length - size + 1 for length in x.shape[1:3])
    pixels = [x[:, i : i + rows : stride, j : j + columns : stride] for i in range(size) for j in range(size)]
    return jnp.concatenate(pixels, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def _mix_tokens(
    config: PoolFormerConfig, mixer: str, params: FoldedParams, x: Float[Array, "b h w c"]
) -> Float[Array, "b h w c"]:
    """The first residual branch and its input."""
    if mixer == "pooling" and config.norm == "group_norm":  # line 3
        _, inverse_std = distance_and_inverse_std(x, (1, 2, 3))
        scale = over_channels(params["scale"], inverse_std)
        return x + pooling_mixer(x, config.pool_size) * (inverse_std * scale).astype(x.dtype)
    normalised, scale = standardize(x, _norm_axes(config)), over_channels(params["scale"], x)
    if mixer == "pooling":
        return x + pooling_mixer(normalised, config.pool_size) * scale
    if mixer == "identity":
        return x + (normalised * scale + over_channels(params["shift"], x))
    gain, shift = (over_channels(params["norm"][name], x) for name in ("scale", "bias"))
    module: Any = TOKEN_MIXERS[mixer](config, x.dtype, "token_mixer")  # every one is a linen module
    mixed = module.apply({"params": params["mixer"]}, normalised * gain + shift)
    return x + jnp.asarray(mixed) * scale


def _mix_channels(
    config: PoolFormerConfig, params: FoldedParams, x: Float[Array, "b h w c"]
) -> Float[Array, "b h w c"]:
    """The second residual branch and its input."""
    hidden = _dense(params["fc1"], standardize(x, _norm_axes(config)))
    return x + _dense(params["fc2"], ACTIVATIONS[config.hidden_act](hidden))


def _dense(params: Mapping[str, Array], x: Float[Array, "*b c"]) -> Float[Array, "*b c2"]:
    """A dense layer, in the type of its input."""
    y = x @ params["kernel"].astype(x.dtype)
    return y + over_channels(params["bias"], y)


def _norm_axes(config: PoolFormerConfig) -> tuple[int, ...]:
    """What a block's norm averages over."""
    return (1, 2, 3) if config.norm == "group_norm" else (-1,)

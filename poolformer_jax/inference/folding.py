"""The parameters of the same network for inference, with every constant factor multiplied into a matrix.

Exact algebra, no approximation; only the rounding of float32 differs. Write a norm as `n * gain + shift` where
`n = (x - mean) / std` has no parameters (shift is 0 where the network has none), and `s` for a layer scale (1 where the
network has none). All of these are vectors over channels, so each commutes with every operation that is the same for
all channels.

1. Pooling branch: `s * (pool(n * gain + shift) - (n * gain + shift))`. The pooling mean counts only pixels inside the
   image, so the mean of a constant is that constant: `pool(shift) - shift = 0`, and shift is gone.
2. `gain` is the same at every position, hence `pool(n * gain) = pool(n) * gain`: one vector `s * gain` is left.
3. Group norm only: mean and std are one number per image. The mean is a constant again and cancels as shift did, and
   1 / std moves out: the branch is `(s * gain / std) * (pool(x) - x)`. No normalised map is ever written.
4. Identity branch: `s * (n * gain + shift) = n * (s * gain) + s * shift`. A matrix over the positions, the same for all
   channels: `s * M(n * gain) = M(n) * (s * gain)`, if there is no shift.
5. Attention and sep_conv begin and end with a dense layer: gain and shift go into the first as in 6, s into the last as
   in 7. Other mixers stay as they are between their norm and their layer scale.
6. First MLP layer: `(n * gain + shift) @ K + b = n @ (gain[:, None] * K) + (shift @ K + b)`.
7. Second MLP layer: `s * (h @ K + b) = h @ (K * s) + b * s`.
8. Head: averaging over positions commutes with `* gain + shift`, which then goes into the head's kernel and bias as
   in 6. With one group, `mean(n) = (mean over positions of x - mean) / std`: the map is not normalised either.
   Without a head (num_labels=0) gain and shift are applied to the pooled vector. In the "mlp" head they go into fc1,
   and the gain and shift of its inner norm into fc2.
9. The norm before a convolution has no shift: its gain goes into the kernel, `conv(pad(n * gain), K) = conv(pad(n),
   gain * K)`. The norm after the stem keeps its gain, because the trunk of the residual connections reads it.
10. StarReLU `scale * r + bias` with `r = relu(x)²`, before a dense layer: `(scale * r + bias) @ K = r @ (scale * K) +
   bias * sum(K)`. Before a depthwise convolution it stays: its bias is not in the zero padding.
11. A residual scale stays on the trunk, because the next norm reads the sum.

Line 3 follows from Section 3.2 of arXiv 2111.11418. The rest is the usual folding of batch norm (arXiv 1712.05877,
Section 3.2). It also works for these norms, whose statistics depend on the image, because it leaves the statistics out.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

from poolformer_jax.inference.description import block_names
from poolformer_jax.network import PoolFormerConfig, check_variables, fold_star_relu, merge_collections

# Nested dictionaries of float32 arrays; `fold_tree` lists them.
FoldedParams: TypeAlias = dict[str, Any]


def fold(config: PoolFormerConfig, variables: Mapping[str, Any]) -> FoldedParams:
    """The folded parameters of a `MetaFormerForImageClassification`, computed in float64 and rounded once.

    The result is that of `fold_tree`, as float32 arrays on the default device. Raises WeightsMismatch if the variables
    are not those of such a network.
    """
    check_variables(config, variables)
    tree = jax.device_get(merge_collections(variables))
    folded = fold_tree(config, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree))
    rounded: FoldedParams = jax.device_put(jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), folded))
    return rounded


def fold_tree(config: PoolFormerConfig, params: Mapping[str, Any]) -> FoldedParams:
    """The algebra without conversions: in the type of the parameters, which may be tracers.

    Returns:
        `stem` {kernel, bias, scale if a norm follows it} and `stages_{s}/downsample` {kernel, bias};
        `stages_{s}/position_embedding` if the stage has one; `stages_{s}/blocks_{b}/mlp`: {fc1, fc2} and `token_mixer`:
        {scale, shift} and {norm, mixer} as far as they are left, in both {trunk} if the stage has residual scales;
        `head` {kernel, bias} or {fc1, fc2}, or `norm` {scale, bias} without labels. A dense layer is {kernel, bias}, or
        {kernel} if no bias is left.
    """
    stem = params["stem"]
    folded: FoldedParams = {"stem": {**stem["conv"], **stem.get("norm", {})}}
    for index, depth in enumerate(config.depths):
        stage = params[f"stages_{index}"]
        folded[f"stages_{index}"] = {
            **({"downsample": _fold_downsample(stage["downsample"])} if index > 0 else {}),
            **{name: stage[name] for name in ("position_embedding",) if name in stage},
            **{name: _fold_block(config.token_mixers[index], stage[name]) for name in block_names(depth)},
        }
    if config.num_labels:
        folded["head"] = _fold_head(params["norm"], params["head"])
    else:
        folded["norm"] = params["norm"]
    return folded


def _fold_downsample(downsample: Mapping[str, Any]) -> FoldedParams:
    conv = downsample["conv"]
    if "norm" not in downsample:
        return dict(conv)
    return {"kernel": downsample["norm"]["scale"][:, None] * conv["kernel"], "bias": conv["bias"]}  # line 9


def _fold_head(norm: Mapping[str, Any], head: Mapping[str, Any]) -> FoldedParams:
    if "fc1" not in head:
        return _fold_norm(norm, head)
    return {"fc1": _fold_norm(norm, head["fc1"]), "fc2": _fold_norm(head["norm"], head["fc2"])}


def _fold_block(mixer: str, block: Mapping[str, Any]) -> FoldedParams:
    trunks = [block.get(f"residual_scale_{branch}") for branch in (1, 2)]
    trunk_1, trunk_2 = ({"trunk": scale["scale"]} if scale else {} for scale in trunks)  # line 11
    return {
        "token_mixer": {**_fold_token_mixer(mixer, block), **trunk_1},
        "mlp": {**_fold_mlp(block), **trunk_2},
    }


def _fold_token_mixer(mixer: str, block: Mapping[str, Any]) -> FoldedParams:
    norm, params, scale = block["norm1"], block.get("token_mixer", {}), _layer_scale(block, 1)
    match mixer:
        case "pooling":  # lines 1 and 2
            return {"scale": scale * norm["scale"]}
        case "identity":  # line 4
            shift = {"shift": scale * norm["bias"]} if "bias" in norm else {}
            return {"scale": scale * norm["scale"], **shift}
        case "spatial_fc" | "random" if "bias" not in norm:  # line 4
            return {"mixer": params, "scale": scale * norm["scale"]}
        case "attention":  # line 5
            qkv, proj = _fold_norm(norm, params["qkv"]), _fold_scale(params["proj"], scale)
            return {"mixer": {**params, "qkv": qkv, "proj": proj}}
        case "sep_conv":  # line 5
            first, last = _fold_norm(norm, params["pwconv1"]), _fold_scale(params["pwconv2"], scale)
            ones = np.ones(first["kernel"].shape[1], np.float32)
            act = {name: number * ones for name, number in params["act1"].items()}
            return {"mixer": {**params, "pwconv1": first, "act1": act, "pwconv2": last}}
        case _:
            return {"norm": norm, "mixer": params, "scale": scale}


def _fold_mlp(block: Mapping[str, Any]) -> FoldedParams:
    fc1, fc2 = block["mlp"]["fc1"], block["mlp"]["fc2"]
    if "act" in block["mlp"]:  # line 10
        fc2 = fold_star_relu(block["mlp"]["act"], fc2)
    return {"fc1": _fold_norm(block["norm2"], fc1), "fc2": _fold_scale(fc2, _layer_scale(block, 2))}


def _layer_scale(block: Mapping[str, Any], branch: int) -> Any:
    ones = np.ones(block["norm1"]["scale"].shape, np.float32)
    return block.get(f"layer_scale_{branch}", {"scale": ones})["scale"]


def _fold_norm(norm: Mapping[str, Any], dense: Mapping[str, Any]) -> FoldedParams:
    """Line 6: a norm's gain and shift, multiplied into the dense layer that follows it."""
    kernel = dense["kernel"]
    biases = [norm["bias"] @ kernel] if "bias" in norm else []
    biases += [dense["bias"]] if "bias" in dense else []
    return {"kernel": norm["scale"][:, None] * kernel, **({"bias": sum(biases[1:], biases[0])} if biases else {})}


def _fold_scale(dense: Mapping[str, Any], scale: Any) -> FoldedParams:
    """Line 7: a dense layer, multiplied with the layer scale that follows it."""
    return {name: value * scale for name, value in dense.items()}

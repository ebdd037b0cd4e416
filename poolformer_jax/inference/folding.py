"""The parameters of the same network for inference, with every constant factor multiplied into a matrix.

Exact algebra, no approximation; only the rounding of float32 differs. Write a norm as `n * gain + shift` where
`n = (x - mean) / std` has no parameters, and `s` for a layer scale (1 where the network has none). All of these are
vectors over channels, so each commutes with every operation that is the same for all channels.

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

Line 3 follows from Section 3.2 of arXiv 2111.11418. The rest is the usual folding of batch norm (arXiv 1712.05877,
Section 3.2). It also works for these norms, whose statistics depend on the image, because it leaves the statistics out.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

from poolformer_jax.inference.description import block_names
from poolformer_jax.network import PoolFormerConfig, check_variables

# Nested dictionaries of float32 arrays; `fold_tree` lists them.
FoldedParams: TypeAlias = dict[str, Any]


def fold(config: PoolFormerConfig, variables: Mapping[str, Any]) -> FoldedParams:
    """The folded parameters of a `PoolFormerForImageClassification`, computed in float64 and rounded once.

    Args:
        config: the architecture.
        variables: `{"params": tree}` as `model.init` or `load_pretrained` returns it.

    Returns:
        What `fold_tree` does, as float32 arrays on the default device.

    Raises:
        WeightsMismatch: if the variables are not those of such a network.
    """
    check_variables(config, variables)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), jax.device_get(dict(variables["params"])))
    folded = fold_tree(config, params)
    rounded: FoldedParams = jax.device_put(jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), folded))
    return rounded


def fold_tree(config: PoolFormerConfig, params: Mapping[str, Any]) -> FoldedParams:
    """The algebra without conversions: in the type of the parameters, which may be tracers.

    Returns:
        `stem` and `stages_{s}/downsample` {kernel, bias}; `stages_{s}/position_embedding` if the stage has one;
        `stages_{s}/blocks_{b}/mlp/fc1`, `fc2` {kernel, bias} and `token_mixer`: {scale} for pooling, {scale, shift} for
        identity, {norm, mixer, scale} for the others; `head` {kernel, bias}, or `norm` {scale, bias} without labels.
    """
    folded: FoldedParams = {"stem": params["stem"]["conv"]}
    for index, depth in enumerate(config.depths):
        stage = params[f"stages_{index}"]
        folded[f"stages_{index}"] = {
            **({"downsample": stage["downsample"]["conv"]} if index > 0 else {}),
            **{name: stage[name] for name in ("position_embedding",) if name in stage},
            **{name: _fold_block(config.token_mixers[index], stage[name]) for name in block_names(depth)},
        }
    if config.num_labels:
        folded["head"] = _fold_affine(params["norm"], params["head"])
    else:
        folded["norm"] = params["norm"]
    return folded


def _fold_block(mixer: str, block: Mapping[str, Any]) -> FoldedParams:
    norm, fc2 = block["norm1"], block["mlp"]["fc2"]
    ones = np.ones(norm["scale"].shape, np.float32)
    scale_1, scale_2 = (block.get(f"layer_scale_{branch}", {"scale": ones})["scale"] for branch in (1, 2))
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
    """Line 6: a norm's gain and shift, multiplied into the dense layer that follows it."""
    kernel = dense["kernel"]
    return {"kernel": norm["scale"][:, None] * kernel, "bias": norm["bias"] @ kernel + dense["bias"]}

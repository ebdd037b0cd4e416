"""The networks of the second paper with the weights of their golden arrays, `golden/family`."""

import re

import numpy as np

from golden import fixture_values, published
from poolformer_jax import MetaFormerConfig
from poolformer_jax.network import VARIANTS, all_parameters, variables_of

KINDS = {"poolformerv2": "s12", "identityformer": "s12", "randformer": "s12", "convformer": "s18", "caformer": "s18"}
FAMILY = tuple(name for name in VARIANTS if name.split("_")[0] in KINDS)
# Of the LayerNorm inside the MLP head: the only difference between what timm and the authors compute.
HEAD_EPSILON = {"timm": 1e-6, "sail": 1e-5}
_TINY = {"depths": (1, 1, 1, 1), "hidden_sizes": (8, 16, 32, 64), "num_labels": 10}


def config(home, variant, **changes):
    """The config of a published network, or of a small one such as "caformer_tiny"."""
    kind, size = variant.split("_")
    changes["head_norm_epsilon"] = HEAD_EPSILON[home]
    if size != "tiny":
        return MetaFormerConfig.from_variant(variant, **changes)
    image_size = 64 if kind == "randformer" else None
    return MetaFormerConfig.from_variant(f"{kind}_{KINDS[kind]}", **{**_TINY, "image_size": image_size, **changes})


def variables(home, config, dtype):
    """The weights, whose values follow from their PyTorch names."""
    values = {}
    for parameter in all_parameters(config):
        order = (3, 2, 0, 1) if len(parameter.shape) == 4 else range(len(parameter.shape))[::-1]
        shape = tuple(parameter.shape[axis] for axis in order)
        stored = fixture_values.parameter(name_of(home, parameter.path), shape)
        values[parameter.path] = stored.transpose(np.argsort(order)).astype(dtype)
    return variables_of(config, values)


def name_of(home, path):
    """The PyTorch name of a path in the parameter tree."""
    for pattern, name in _NAMES + (_NAMES_OF_SAIL if home == "sail" else ()):
        path = re.sub(pattern, name, path)
    return path


_NAMES = (
    (r"(norm\d?)/scale$", r"\1/weight"),
    (r"random/kernel$", "random_matrix"),
    (r"kernel$", "weight"),
    (r"residual_scale_", "res_scale"),
    (r"/", "."),
    (r"^head\.", "head.fc."),
    (r"^norm\.", "head.norm."),
    (r"^stages_(\d)\.", r"stages.\1."),
    (r"blocks_(\d+)\.", r"blocks.\1."),
)
_NAMES_OF_SAIL = (
    (r"^head\.norm\.", "norm."),
    (r"^head\.fc\.", "head."),
    (r"^stem\.conv", "downsample_layers.0.conv"),
    (r"^stem\.norm", "downsample_layers.0.post_norm"),
    (r"^stages\.(\d)\.downsample\.conv", r"downsample_layers.\1.conv"),
    (r"^stages\.(\d)\.downsample\.norm", r"downsample_layers.\1.pre_norm"),
    (r"\.blocks\.", "."),
)


def arrays(home, variant):
    """The golden arrays; of most networks these are the logits."""
    if (published.FOLDER / f"family/{home}_{variant}.npz").is_file():
        return published.arrays(f"family/{home}", variant)
    with np.load(published.FOLDER / "family/logits_224x224.npz") as logits:
        return {"224x224/logits": logits[f"{home}_{variant}"]}

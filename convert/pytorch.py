"""The same network in PyTorch, by `transformers`: what a conversion is compared with where both are installed."""

import importlib.util
from typing import Any

import numpy as np

from convert.conversion import Source, pair
from poolformer_jax.weights.names import TRANSFORMS


def why_not(source: Source) -> str | None:
    """Why a network cannot be compared with PyTorch's; None if it can."""
    absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} not installed"
    config = source.config
    if set(config.token_mixers) != {"pooling"} or config.norm != "group_norm" or any(config.position_embeddings):
        return "transformers has no model with these token mixers"
    return None


def outputs(source: Source, pixel_values: np.ndarray, head_order: str) -> dict[str, np.ndarray]:
    """Every stage's feature map [b, h, w, c] and the logits, computed by PyTorch from the source's own arrays.

    The arrays are renamed and nothing else, so that a mistake in a transform shows as a difference.
    """
    import torch

    model = _model(source)
    pixels = torch.from_numpy(np.ascontiguousarray(pixel_values.transpose(0, 3, 1, 2)))
    with torch.no_grad():
        stages = model.poolformer(pixels, output_hidden_states=True).hidden_states
        logits = model.classifier(_pooled(model.norm, stages[-1], head_order))
    found = {f"stage {index}": stage.numpy().transpose(0, 2, 3, 1) for index, stage in enumerate(stages)}
    return {**found, "logits": logits.numpy()}


def _pooled(norm: Any, features: Any, head_order: str) -> Any:
    if head_order == "norm_pool":
        return norm(features).mean((-2, -1))
    # timm's head: average first, then LayerNorm with its own epsilon.
    from torch.nn.functional import layer_norm

    return layer_norm(features.mean((-2, -1)), norm.weight.shape, norm.weight, norm.bias, 1e-6)


def _model(source: Source) -> Any:
    import torch
    import transformers

    fields = (
        "num_channels depths hidden_sizes mlp_ratio pool_size patch_sizes strides padding hidden_act use_layer_scale "
        "num_labels"
    )
    data = source.config.to_dict()
    config = transformers.PoolFormerConfig(**{name: data[name] for name in fields.split()})
    model = transformers.PoolFormerForImageClassification(config).eval()
    state_dict = {}
    for one in pair(source, "hf"):
        array = np.asarray(source.weights.tensors[one.given_name]).astype(np.float32)
        if source.layout == "jax":  # our own file has to be laid out for PyTorch
            array = TRANSFORMS[one.target.transform].there(array)
        state_dict[one.target.name] = torch.from_numpy(np.ascontiguousarray(array))
    model.load_state_dict(state_dict, strict=True)
    return model

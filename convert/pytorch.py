"""The same network in PyTorch, by `transformers`, to compare a conversion with."""

import importlib.util
from typing import Any

import numpy as np

from convert.conversion import map_arrays
from poolformer_jax.weights import TRANSFORMS, OpenedModel


def reason_not_to_compare(source: OpenedModel) -> str | None:
    """Why a network cannot be compared with PyTorch's; None if it can."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    config = source.config
    if config.downsample_norm:
        return "transformers has no model of the second paper's networks"
    if not set(config.token_mixers) <= {"pooling", "identity"} or any(config.position_embeddings):
        return "transformers has no model with these token mixers"
    return None


def outputs(source: OpenedModel, pixel_values: np.ndarray, head_order: str) -> dict[str, np.ndarray]:
    """Every stage's feature map [b, h, w, c] and the logits, computed by PyTorch from the source's arrays.

    The arrays are only renamed, so that an error in a transform shows as a difference.
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
    # timm's head: average, then LayerNorm with epsilon 1e-6.
    from torch.nn.functional import layer_norm

    return layer_norm(features.mean((-2, -1)), norm.weight.shape, norm.weight, norm.bias, 1e-6)


def _model(source: OpenedModel) -> Any:
    import torch
    import transformers

    model = transformers.PoolFormerForImageClassification(_config(source)).eval()
    if source.config.norm == "layer_norm":
        _replace_norms(model)
    for stage, mixer in zip(model.poolformer.encoder.block, source.config.token_mixers, strict=True):
        for block in stage if mixer == "identity" else ():
            block.pooling = torch.nn.Identity()
    state_dict = {}
    for one in map_arrays(source, "hf"):
        array = np.asarray(source.weights.tensors[one.given_name]).astype(np.float32)
        if source.plan.layout == "jax":  # only our arrays have another layout than PyTorch's
            array = TRANSFORMS[one.target.transform].to_layout(array)
        state_dict[one.target.name] = torch.from_numpy(np.ascontiguousarray(array))
    model.load_state_dict(state_dict, strict=True)
    return model


def _config(source: OpenedModel) -> Any:
    """transformers' own reading of its config.json, so that a wrong reading of ours shows; else of our config."""
    import transformers

    if source.files.config is not None and source.plan.layout == "hf":
        config = transformers.PoolFormerConfig.from_json_file(str(source.files.config))
        config.num_labels = source.config.num_labels  # a config.json may leave it out
        return config
    fields = (
        "num_channels depths hidden_sizes mlp_ratio pool_size patch_sizes strides padding hidden_act use_layer_scale "
        "num_labels"
    )
    data = source.config.to_dict()
    return transformers.PoolFormerConfig(**{name: data[name] for name in fields.split()})


def _replace_norms(model: Any) -> None:
    """Gives the blocks, and the end, the LayerNorm over channels of the authors' ablation (`LayerNormChannel`)."""
    import torch

    class LayerNormChannel(torch.nn.Module):  # type: ignore[misc]  # torch is optional
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.weight, self.bias = (torch.nn.Parameter(torch.empty(channels)) for _ in range(2))

        def forward(self, x: Any) -> Any:
            mean, variance = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
            return (x - mean) / (variance + 1e-5).sqrt() * self.weight[:, None, None] + self.bias[:, None, None]

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.GroupNorm):
                setattr(module, name, LayerNormChannel(child.num_channels))

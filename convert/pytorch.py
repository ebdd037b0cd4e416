"""The same network in PyTorch, to compare a conversion with.

By `timm` for its own layout and for the second paper's networks, else by `transformers`.
"""

import importlib.util
from typing import Any

import numpy as np

from convert.conversion import map_arrays
from poolformer_jax.weights import TRANSFORMS, OpenedModel


def reason_not_to_compare(source: OpenedModel, head_order: str) -> str | None:
    """Why a network cannot be compared with PyTorch's, in this order of the head; None if it can."""
    if _timm_model(source, head_order) is not None:
        return None
    config = source.config
    needed = ("torch", "timm" if config.downsample_norm else "transformers")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        return f"{' and '.join(missing)} not installed"
    if config.downsample_norm:
        return "timm has no such network; transformers has none of the second paper"
    if not set(config.token_mixers) <= {"pooling", "identity"} or any(config.position_embeddings):
        return "transformers has no model with these token mixers"
    return None


def outputs(source: OpenedModel, pixel_values: np.ndarray, head_order: str) -> dict[str, np.ndarray]:
    """Every stage's feature map [b, h, w, c] and the logits, computed by PyTorch from the source's arrays.

    The arrays are only renamed, so that an error in a transform shows as a difference.
    """
    import torch

    pixels = torch.from_numpy(np.ascontiguousarray(pixel_values.transpose(0, 3, 1, 2)))
    with torch.no_grad():
        if (timm_model := _timm_model(source, head_order)) is not None:
            stages, logits = _timm_outputs(timm_model, pixels)
        else:
            model = _model(source)
            stages = model.poolformer(pixels, output_hidden_states=True).hidden_states
            logits = model.classifier(_pooled(model.norm, stages[-1], head_order))
    found = {f"stage {index}": stage.numpy().transpose(0, 2, 3, 1) for index, stage in enumerate(stages)}
    return {**found, "logits": logits.numpy()}


def _timm_model(source: OpenedModel, head_order: str) -> Any:
    """timm's model with the source's arrays; None for another layout or network, or if timm cannot be imported."""
    variant, config = source.plan.variant, source.config
    by_timm = source.plan.layout == "timm" or config.downsample_norm
    if not by_timm or head_order != "pool_norm" or variant is None:
        return None
    try:
        import timm
    except ImportError:  # timm needs torchvision
        return None
    name = variant if "_" in variant else f"poolformer_{variant}"
    if not timm.is_model(name):
        return None
    model = timm.create_model(name, num_classes=config.num_labels, in_chans=config.num_channels).eval()
    if config.head == "mlp" and config.num_labels:
        model.head.fc.norm.eps = config.head_norm_epsilon  # the authors' is another one
    model.load_state_dict(_state_dict(source, "timm"), strict=True)
    return model


def _timm_outputs(model: Any, pixels: Any) -> tuple[list[Any], Any]:
    """The feature maps and the logits."""
    stages = [model.stem(pixels)]
    for stage in model.stages:
        stages.append(stage(stages[-1]))
    return stages[1:], model.forward_head(stages[-1])


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
    model.load_state_dict(_state_dict(source, "hf"), strict=True)
    return model


def _state_dict(source: OpenedModel, layout: str) -> dict[str, Any]:
    """The source's arrays as tensors, by their names in a layout of PyTorch."""
    import torch

    tensors = {}
    for one in map_arrays(source, layout):
        array = np.asarray(source.weights.tensors[one.given_name]).astype(np.float32)
        if source.plan.layout == "jax":  # only our arrays have another layout than PyTorch's
            array = np.ascontiguousarray(TRANSFORMS[one.target.transform].to_layout(array))
        # The authors' dense layers are 1 x 1 convolutions in timm.
        tensors[one.target.name] = torch.from_numpy(array.reshape(one.target.stored_shape))
    return tensors


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

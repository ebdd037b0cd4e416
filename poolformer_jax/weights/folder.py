"""Writes model folders for each layout: the files, and which networks the layout's model can compute."""

import dataclasses
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from poolformer_jax.errors import InputError
from poolformer_jax.files import write_json
from poolformer_jax.hub import CONFIG
from poolformer_jax.images import PREPROCESSOR_CONFIG, PoolFormerImageProcessor
from poolformer_jax.network import PoolFormerConfig, published_variant
from poolformer_jax.weights.containers.writers import write_safetensors, write_torch
from poolformer_jax.weights.model_card import MODEL_CARD, model_card
from poolformer_jax.weights.model_files import OUR_WEIGHTS, WEIGHTS
from poolformer_jax.weights.model_replacement import staged_model
from poolformer_jax.weights.names import LAYOUTS, leaves
from poolformer_jax.weights.published import IN_TIMM, class_names, default_image_processor, timms_name
from poolformer_jax.weights.source import CONFIG_METADATA
from poolformer_jax.weights.timm_config import timms_config, timms_variant

# The fields of transformers.PoolFormerConfig. `_check_supported` makes sure that our other fields have the values that
# are built into transformers' model.
_HF_FIELDS = (
    "model_type architectures num_channels depths hidden_sizes mlp_ratio pool_size patch_sizes strides padding "
    "drop_path_rate hidden_act use_layer_scale layer_scale_init_value num_labels id2label label2id num_encoder_blocks "
    "problem_type output_hidden_states return_dict "
    "dropout_rate"  # transformers ignores it, and keeps it
)

# Fields of the blocks that are the same in every network of the first paper, and in every one of the second.
_BUILT_IN = ("norm_bias", "norm_epsilon", "mlp_bias", "attention_bias")


def write_model(
    folder: str | os.PathLike[str],
    config: PoolFormerConfig,
    layout: str,
    arrays: Iterable[np.ndarray],
    image_processor: PoolFormerImageProcessor | None = None,
    metrics: Mapping[str, int | float] | None = None,
    *,
    classifier: bool = True,
    described_by: Sequence[str] = (),
) -> None:
    """As `save_pretrained`, with arrays that are read one by one, in the order of `names.leaves(config, layout)`.

    `classifier=False` writes the backbone alone. Files of these names describe the model that is replaced, and go with
    it.
    """
    # Also refuses an unknown layout.
    names = [(leaf.name, leaf.stored_shape) for leaf in leaves(config, layout, classifier=classifier)]
    _check_supported(config, layout)
    fixed = LAYOUTS[layout].fixed_fields(config)
    _warn_of_fixed_fields(config, layout, fixed)
    target = Path(folder).expanduser()
    processor = _processor_to_save(image_processor, target, config)
    saved = dataclasses.replace(config, **fixed)
    file = {"jax": OUR_WEIGHTS, "sail": "model.pth.tar"}.get(layout, "model.safetensors")
    with staged_model(target, file, described_by) as stage:
        if processor is not None:
            processor.save_pretrained(stage)
        write_json(stage / CONFIG, _config_json(saved, layout, processor, classifier))
        (stage / MODEL_CARD).write_text(
            model_card(
                target.resolve().name, saved, layout, metrics, classifier=classifier, preprocessed=processor is not None
            ),
            encoding="utf-8",
        )
        if layout == "sail":
            write_torch(stage / file, names, arrays)
        else:
            ours = {"format": "flax", CONFIG_METADATA: json.dumps(saved.to_dict())}
            # transformers requires "format": "pt".
            write_safetensors(stage / file, names, arrays, ours if layout == "jax" else {"format": "pt"})


def _processor_to_save(
    given: PoolFormerImageProcessor | None, target: Path, config: PoolFormerConfig
) -> PoolFormerImageProcessor | None:
    """The preprocessing given, or that of the folder, or that of the published network; None without.

    Raises InputError if it makes another number of channels than the network takes.
    """
    processor = given or _kept_image_processor(target, config) or default_image_processor(config)
    if processor is not None and processor.num_channels != config.num_channels:
        raise InputError(
            f"The preprocessing makes {processor.num_channels} channels, and this network takes {config.num_channels}. "
            "Expected a mean and a standard deviation for each channel, or no preprocessing."
        )
    return processor


def _kept_image_processor(target: Path, config: PoolFormerConfig) -> PoolFormerImageProcessor | None:
    """The preprocessing that the folder has, or None. Preprocessing for other channels does not count."""
    if not (target / PREPROCESSOR_CONFIG).exists():
        return None
    processor, default = PoolFormerImageProcessor.from_pretrained(target), default_image_processor(config)
    if processor.num_channels != config.num_channels:
        return None
    if default not in (None, processor) and any((target / name).exists() for name in WEIGHTS):
        warnings.warn(
            f"Keeps the preprocessing in {target}, which is not that of {published_variant(config)}. To replace it, "
            "pass image_processor=...",
            stacklevel=5,
        )
    return processor


def _check_supported(config: PoolFormerConfig, layout: str) -> None:
    """Raises if the layout's model would compute something else with these parameters."""
    wanted: dict[str, Any] = {}
    if layout in ("hf", "timm") and not config.downsample_norm:
        stages = len(config.depths)
        wanted = {"token_mixers": ("pooling",) * stages, "norm": "group_norm", "position_embeddings": (False,) * stages}
        if layout == "timm":
            wanted |= {"pool_size": 3, "hidden_act": "gelu", "use_layer_scale": True}
    if layout != "jax":
        paper = PoolFormerConfig.from_variant("poolformerv2_s12" if config.downsample_norm else "s12")
        wanted |= {name: getattr(paper, name) for name in _BUILT_IN}
    if wrong := {name: value for name, value in wanted.items() if getattr(config, name) != value}:
        given = ", ".join(f"{name}={getattr(config, name)!r}" for name in wrong)
        raise InputError(
            f"The model of {layout} cannot compute a network with {given}. Expected "
            f"{', '.join(f'{name}={value!r}' for name, value in wrong.items())}; 'jax' takes every network."
        )
    if layout == "timm" and timms_variant(config) not in IN_TIMM:
        raise InputError(
            f"timm.create_model has no network of depths {config.depths}, widths {config.hidden_sizes} and token "
            f"mixers {config.token_mixers}. Expected one of {', '.join(map(timms_name, IN_TIMM))}; save this one as "
            "'sail' or 'jax'."
        )


def _warn_of_fixed_fields(config: PoolFormerConfig, layout: str, fixed: Mapping[str, Any]) -> None:
    for name, there in fixed.items():
        if there != getattr(config, name):
            warnings.warn(
                f"This network has {name}={getattr(config, name)!r}, and the model of {layout} computes {there!r}: its "
                "logits will differ, with the same weights. convert --verify computes by how much.",
                stacklevel=4,
            )


def _config_json(
    config: PoolFormerConfig, layout: str, processor: PoolFormerImageProcessor | None, classifier: bool
) -> dict[str, Any]:
    """The entries of config.json, in the dialect of the layout."""
    if layout == "timm":
        return timms_config(config, processor)
    if layout == "hf" and config.id2label is None and config.num_labels == 1000 and published_variant(config):
        # transformers does not know ImageNet's names.
        config = dataclasses.replace(config, id2label=class_names(config))
    data = config.to_dict()
    if not classifier:
        data["architectures"] = [name.replace("ForImageClassification", "Model") for name in data["architectures"]]
    return {name: data[name] for name in _HF_FIELDS.split() if name in data} if layout == "hf" else data

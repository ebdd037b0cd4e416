"""timm's config.json: what it adds to what the arrays show (head order and class names), and writing one."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from poolformer_jax.errors import InputError
from poolformer_jax.images import PoolFormerImageProcessor, share_of_edge
from poolformer_jax.messages import printable, short_repr
from poolformer_jax.network import PoolFormerConfig, published_variant
from poolformer_jax.weights.names import LAYOUTS
from poolformer_jax.weights.published import timms_name, variants_like


def is_timms(data: Mapping[str, Any]) -> bool:
    """True for the entries of timm's config.json, False for those of transformers' or this package's."""
    return "architecture" in data


def with_timms_config(config: PoolFormerConfig, data: Mapping[str, Any], path: Path) -> PoolFormerConfig:
    """The network, with the head order and the class names of timm's config.json."""
    try:
        labels = _timms_labels(data)
        given = {name: data[name] for name in ("num_classes", "global_pool") if name in data}
        given |= data.get("model_args") or {}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"timm's config in {path} is malformed: {error}") from error
    _check_timms_architecture(config, str(data["architecture"]), given, path)
    id2label = labels if labels and len(labels) == config.num_labels else None
    # Timm's model also takes weights with the authors' names.
    fixed = LAYOUTS["timm"].fixed_fields(config)
    return dataclasses.replace(config, **fixed, id2label=id2label, problem_type=data.get("problem_type"))


def _timms_labels(data: Mapping[str, Any]) -> dict[int, str] | None:
    """Class names by index; None if timm's config.json has none."""
    cfg = data.get("pretrained_cfg") or data
    names = data.get("label_names") or cfg.get("label_names") or data.get("labels")
    texts = data.get("label_descriptions") or cfg.get("label_descriptions") or {}
    if not names:
        return None
    by_index = names.items() if isinstance(names, Mapping) else enumerate(names)
    return {int(index): str(texts.get(label, label)) for index, label in by_index}


_NO_ENTRY = "no such entry"
# Entries of timm's config.json that have no effect at inference.
_TIMM_TRAINING = ("drop_rate", "drop_path_rate", "proj_drop_rate", "layer_scale_init_values")


def _check_timms_architecture(
    config: PoolFormerConfig, architecture: str, given: Mapping[str, Any], path: Path
) -> None:
    """Raises if timm's model, with the arguments `given`, computes something else with these weights."""
    expected = {
        "num_classes": config.num_labels,
        "global_pool": "avg",
        "in_chans": config.num_channels,
        "depths": list(config.depths),
        "dims": list(config.hidden_sizes),
    }
    wrong = [
        f"{printable(name)}={short_repr(value)}: expected {repr(expected[name]) if name in expected else _NO_ENTRY}"
        for name, value in given.items()
        if value is not None and value != expected.get(name) and name not in _TIMM_TRAINING
    ]
    known = [timms_name(name) for name in variants_like(config)]
    if (architecture := architecture.split(".")[0]) not in known:
        wrong.append(f"architecture={short_repr(architecture)}: expected {' or '.join(known)}")
    if wrong:
        raise InputError(
            f"timm's config in {path} does not match these weights, or needs a network that is not implemented here:"
            "\n  " + "\n  ".join(wrong)
        )


def timms_config(config: PoolFormerConfig, processor: PoolFormerImageProcessor | None) -> dict[str, Any]:
    """The entries of timm's config.json for a network that timm has.

    Raises InputError if timm cannot preprocess as `processor`.
    """
    preprocessing = {} if processor is None else _timm_preprocessing(processor)
    side = 224 if processor is None else processor.crop_size["height"]
    data: dict[str, Any] = {
        "architecture": timms_name(timms_variant(config) or ""),
        "num_classes": config.num_labels,
        "num_features": config.hidden_sizes[-1],
        "global_pool": "avg",
        "pretrained_cfg": {
            "num_classes": config.num_labels,
            "input_size": [config.num_channels, side, side],
            "pool_size": [config.feature_sizes(side)[-1]] * 2,
            "classifier": "head.fc.fc2" if config.head == "mlp" else "head.fc",
            **preprocessing,
        },
    }
    if config.num_channels == 3:
        data["pretrained_cfg"]["first_conv"] = "stem.conv"
    else:  # timm assumes three channels for `first_conv`, and would change the convolution
        data["model_args"] = {"in_chans": config.num_channels}
    if config.problem_type is not None:  # ignored by timm, read by transformers' TimmWrapper
        data["problem_type"] = config.problem_type
    if config.id2label is not None:
        data["label_names"] = [config.id2label[index] for index in range(config.num_labels)]
    return data


def _timm_preprocessing(processor: PoolFormerImageProcessor) -> dict[str, Any]:
    """timm resizes the shorter edge to floor(side / crop_pct), crops the middle, divides by 255, and normalises.

    Raises InputError if that would make other pixels than `processor`.
    """
    side, edge = processor.crop_size["height"], processor.shorter_edge
    cuts = processor.do_resize and processor.do_center_crop and processor.crop_size["width"] == side
    if not cuts or edge is None or edge < side:
        names = ("do_resize", "size", "crop_pct", "do_center_crop", "crop_size")
        raise InputError(
            f"timm cannot preprocess with {', '.join(f'{name}={getattr(processor, name)!r}' for name in names)}. "
            "Expected resizing that keeps the aspect ratio, and a square crop inside of the resized picture; save this "
            "one as 'hf', 'sail' or 'jax'."
        )
    mean, std = processor.normalization.unit_mean_and_std()
    return {
        "crop_pct": share_of_edge(processor, side, edge),
        "crop_mode": "center",
        "interpolation": Image.Resampling(processor.resample).name.lower(),
        "mean": mean,
        "std": std,
    }


def timms_variant(config: PoolFormerConfig) -> str | None:
    """The published network that timm's model is, for any number of channels: an argument of it, `in_chans`."""
    return published_variant(dataclasses.replace(config, num_channels=3))

"""Reads timm's config.json, which adds the head order and the class names to what the arrays show."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from poolformer_jax.errors import InputError
from poolformer_jax.messages import printable, short_repr
from poolformer_jax.network import PoolFormerConfig
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

"""Writes model folders for each layout, whole or not at all.

A new folder appears by one rename. In an existing folder, files are replaced one by one: the old weights are moved away
first and the new ones moved in last. After an error the old files are moved back. A program that is killed in between
leaves a folder without weights, never one with parts of two models; the next save there first moves the old ones back.
"""

import dataclasses
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from poolformer_jax.errors import InputError
from poolformer_jax.files import naming_destination, remove_abandoned, staging_folder, sync, why_unreadable, write_json
from poolformer_jax.images import PREPROCESSOR_CONFIG, PoolFormerImageProcessor, share_of_edge, unit_mean_and_std
from poolformer_jax.network import PoolFormerConfig, published_variant
from poolformer_jax.weights.containers.writers import write_safetensors, write_torch
from poolformer_jax.weights.model_card import GENERATED, MODEL_CARD, model_card
from poolformer_jax.weights.model_files import CONFIG, WEIGHTS
from poolformer_jax.weights.names import LAYOUTS, leaves
from poolformer_jax.weights.published import IN_TIMM, class_names, default_image_processor, timms_name
from poolformer_jax.weights.source import CONFIG_METADATA

# transformers would open model.safetensors with our names, and give all parameters random values.
_OUR_WEIGHTS = "flax_model.safetensors"
_LARGEST_CARD = 1 << 22  # bytes

# The fields of transformers.PoolFormerConfig. `_check_supported` makes sure that our other fields have the values that
# are built into transformers' model.
_HF_FIELDS = (
    "model_type architectures num_channels depths hidden_sizes mlp_ratio pool_size patch_sizes strides padding "
    "drop_path_rate hidden_act use_layer_scale layer_scale_init_value num_labels id2label label2id num_encoder_blocks "
    "problem_type output_hidden_states return_dict "
    "dropout_rate"  # transformers ignores it, and keeps it
)


def write_model(
    folder: str | os.PathLike[str],
    config: PoolFormerConfig,
    layout: str,
    arrays: Iterable[np.ndarray],
    image_processor: PoolFormerImageProcessor | None = None,
    metrics: Mapping[str, int | float] | None = None,
    *,
    classifier: bool = True,
) -> None:
    """As `save_pretrained`, with arrays that are read one by one, in the order of `names.leaves(config, layout)`.

    `classifier=False` writes the backbone alone.
    """
    # Also refuses an unknown layout.
    names = [(leaf.name, leaf.stored_shape) for leaf in leaves(config, layout, classifier=classifier)]
    _check_supported(config, layout)
    fixed = LAYOUTS[layout].fixed_fields(config)
    _warn_of_fixed_fields(config, layout, fixed)
    target = Path(folder).expanduser()
    processor = image_processor or _kept_image_processor(target, config) or default_image_processor(config)
    if processor is not None and processor.num_channels != config.num_channels:
        raise InputError(
            f"The preprocessing makes {processor.num_channels} channels, and this network takes {config.num_channels}. "
            "Expected a mean and a standard deviation for each channel, or no preprocessing."
        )
    saved = dataclasses.replace(config, **fixed)
    config_json = _config_json(saved, layout, processor)
    if not classifier:
        classes = config_json["architectures"]
        config_json["architectures"] = [name.replace("ForImageClassification", "Model") for name in classes]
    file = {"jax": _OUR_WEIGHTS, "sail": "model.pth.tar"}.get(layout, "model.safetensors")
    with _staged(target, file) as stage:
        if processor is not None:
            processor.save_pretrained(stage)
        write_json(stage / CONFIG, config_json)
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
            stacklevel=4,
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
    if layout == "timm" and _timm_variant(config) not in IN_TIMM:
        raise InputError(
            f"timm.create_model has no network of depths {config.depths}, widths {config.hidden_sizes} and token "
            f"mixers {config.token_mixers}. Expected one of {', '.join(map(timms_name, IN_TIMM))}; save this one as "
            "'sail' or 'jax'."
        )


# Fields of the blocks that are the same in every network of the first paper, and in every one of the second.
_BUILT_IN = ("norm_bias", "norm_epsilon", "mlp_bias", "attention_bias")


def _warn_of_fixed_fields(config: PoolFormerConfig, layout: str, fixed: Mapping[str, Any]) -> None:
    for name, there in fixed.items():
        if there != getattr(config, name):
            warnings.warn(
                f"This network has {name}={getattr(config, name)!r}, and the model of {layout} computes {there!r}: its "
                "logits will differ, with the same weights. python -m convert --verify computes by how much.",
                stacklevel=4,
            )


def _timm_variant(config: PoolFormerConfig) -> str | None:
    # timm's models have an argument for other numbers of channels, `in_chans`.
    return published_variant(dataclasses.replace(config, num_channels=3))


def _config_json(config: PoolFormerConfig, layout: str, processor: PoolFormerImageProcessor | None) -> dict[str, Any]:
    if layout == "timm":
        return _timm_config(config, processor)
    if layout != "hf":
        return config.to_dict()
    if config.id2label is None and config.num_labels == 1000 and published_variant(config):
        # transformers does not know ImageNet's names.
        config = dataclasses.replace(config, id2label=class_names(config))
    data = config.to_dict()
    return {name: data[name] for name in _HF_FIELDS.split() if name in data}


def _timm_config(config: PoolFormerConfig, processor: PoolFormerImageProcessor | None) -> dict[str, Any]:
    preprocessing = {} if processor is None else _timm_preprocessing(processor)
    side = 224 if processor is None else processor.crop_size["height"]
    data: dict[str, Any] = {
        "architecture": timms_name(_timm_variant(config) or ""),
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
    mean, std = unit_mean_and_std(processor)
    return {
        "crop_pct": share_of_edge(processor, side, edge),
        "crop_mode": "center",
        "interpolation": Image.Resampling(processor.resample).name.lower(),
        "mean": mean,
        "std": std,
    }


@contextmanager
def _staged(target: Path, weights: str) -> Iterator[Path]:
    """A folder for the model's files. When the block ends it becomes `target`, or they replace those in `target`."""
    with naming_destination(target):
        existing = [name for name in WEIGHTS if (target / name).exists()]
        if others := [name for name in existing if name != weights]:
            raise InputError(
                f"{target} already has other weights ({', '.join(others)}), which could be loaded instead of these. "
                "Expected a new folder, or one with a model of the same layout."
            )
        place = target.resolve()
        # In the target or beside it: on its file system, where files can be renamed into place.
        where = place if place.exists() else place.parent
        if where == place:
            remove_abandoned(place.parent, _put_back)  # of a program that was killed when it had made `place`
        with staging_folder(where, _put_back) as stage:
            model = stage / _MODEL
            model.mkdir()
            yield model
            remove_abandoned(model)
            for file in (*model.iterdir(), model):
                sync(file)
            if where == place:
                if _is_users(place / MODEL_CARD):
                    (model / MODEL_CARD).unlink(missing_ok=True)
                _move_in(stage, [weights, PREPROCESSOR_CONFIG] if existing else [], weights)
            else:
                model.rename(place)
            sync(where)


# What a staging folder holds: the new model, and while it replaces an old one that model's files, and the names of the
# new files.
_MODEL, _OLD, _NAMES, _DONE = "model", "old", "names", "done"


def _move_in(stage: Path, removed: Sequence[str], weights: str) -> None:
    """Replaces the files of the model around `stage`: the old weights go first and the new ones come last."""
    place = stage.parent
    new = sorted((file.name for file in (stage / _MODEL).iterdir()), key=lambda name: name == weights)
    (stage / _OLD).mkdir()
    (stage / _NAMES).mkdir()
    for name in new:
        (stage / _NAMES / name).touch()
    for name in dict.fromkeys([*removed, *new]):
        if (place / name).exists():
            (place / name).replace(stage / _OLD / name)
    for name in new:
        (stage / _MODEL / name).replace(place / name)
    sync(place)
    (stage / _NAMES).rename(stage / _DONE)  # from here on the new model counts


def _put_back(stage: Path) -> None:
    """Puts back the files of an old model that `_move_in` did not replace to the end; the new files go first."""
    parts = [stage / name for name in (_MODEL, _OLD, _NAMES)]
    # A stranger's model folder may hold anything.
    if not all(part.is_dir() and not part.is_symlink() for part in parts):
        return
    waiting, kept, new = ([file.name for file in part.iterdir()] for part in parts)
    for name in sorted(set(new).difference(waiting), key=lambda name: name not in WEIGHTS):
        (stage.parent / name).unlink(missing_ok=True)
    for name in sorted(kept, key=lambda name: name in WEIGHTS):
        (stage / _OLD / name).replace(stage.parent / name)
    sync(stage.parent)
    (stage / _NAMES).rename(stage / _DONE)


def _is_users(card: Path) -> bool:
    """True for a README.md that `model_card` did not write, or that was edited since."""
    if not card.exists():
        return False
    return why_unreadable(card, _LARGEST_CARD) is not None or GENERATED not in card.read_text("utf-8", "replace")

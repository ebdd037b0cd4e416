"""The preprocessing of the published networks, and the files in which transformers and timm save a model's.

`transformers` writes preprocessor_config.json, whose entries have been renamed over the years; `timm` writes a
`pretrained_cfg` into config.json. Both become fields of `PoolFormerImageProcessor`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from PIL import Image

from poolformer_jax.errors import InputError, MissingFileError
from poolformer_jax.files import is_file, read_json
from poolformer_jax.hub import CONFIG, HubOptions, Repository, check_no_revision
from poolformer_jax.messages import first_few, printable, short_repr

PREPROCESSOR_CONFIG = "preprocessor_config.json"

# Of the published networks: the share of the resized edge that the crop keeps (default_cfg in the authors'
# poolformer.py, metaformer.py and metaformer_baselines.py).
CROP_PCT = {
    **dict.fromkeys(("s12", "s24", "s36", "metaformer_id_s12", "metaformer_pppf_s12_224"), 0.9),
    **dict.fromkeys(("m36", "m48"), 0.95),
    **dict.fromkeys(("metaformer_pppa_s12_224", "metaformer_ppaa_s12_224", "metaformer_ppff_s12_224"), 0.95),
    **{
        f"{family}_{size}": 1.0
        for family in ("identityformer", "randformer", "poolformerv2")
        for size in ("s12", "s24", "s36", "m36", "m48")
    },
    **{f"{family}_{size}": 1.0 for family in ("convformer", "caformer") for size in ("s18", "s36", "m36", "b36")},
}

# Entries of preprocessor_config.json without effect on the pixels.
_WITHOUT_EFFECT = frozenset(
    {
        "processor_class",
        "model_input_names",
        "do_resize_and_center_crop",
        "default_to_square",
        "data_format",
        "input_data_format",
        "return_tensors",
        "device",
        "disable_grouping",
    }
)
# transformers' names for this preprocessing. Other models' preprocessing gives the same entries another meaning.
_TYPES = (
    "PoolFormerImageProcessor",
    "PoolFormerImageProcessorFast",
    "PoolFormerImageProcessorPil",
    "PoolFormerFeatureExtractor",
)
_TIMM_FILTERS = {resampling.name.lower(): resampling.value for resampling in Image.Resampling}


def fields_from(data: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """The processor's fields for the entries of a preprocessor_config.json, or of a `pretrained_cfg` of timm.

    Raises InputError, naming every entry that would change the pixels in a way that is not implemented here.
    """
    return _from_timm(data) if "interpolation" in data else _from_transformers(data, known)


def _from_transformers(data: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    fields = {
        name: value for name, value in data.items() if name in known and (value is not None or name == "crop_pct")
    }
    if "do_resize_and_center_crop" in data:  # until 2022 one flag for both, also in the published files
        both = data["do_resize_and_center_crop"]
        fields = {"do_resize": both, "do_center_crop": both, **fields}
    types = ("image_processor_type", "feature_extractor_type")
    if wrong := [f"{name}={short_repr(data[name])}" for name in types if data.get(name) not in (None, *_TYPES)]:
        raise InputError(
            f"This {PREPROCESSOR_CONFIG} is of another model's preprocessing, {', '.join(wrong)}, which makes other "
            f"pixels. Expected one of {', '.join(_TYPES)}, or no such entry."
        )
    unknown = [
        f"{printable(name)}={short_repr(value)}"
        for name, value in data.items()
        if value and name not in known and name not in (*_WITHOUT_EFFECT, *types) and not name.startswith("_")
    ]
    if unknown:
        raise InputError(
            f"These entries of {PREPROCESSOR_CONFIG} are unknown: {first_few(unknown)}. Expected only: "
            f"{', '.join(sorted(known))}. Remove them if they do not change the pixels."
        )
    return fields


def _from_timm(data: Mapping[str, Any]) -> dict[str, Any]:
    """timm also resizes the shorter edge to floor(size / crop_pct) and crops the middle, under other names."""
    if missing := [name for name in ("input_size", "mean", "std") if not isinstance(data.get(name), list | tuple)]:
        raise InputError(f"timm's pretrained_cfg lacks {', '.join(missing)}. Expected a list for each.")
    if data.get("crop_mode") not in (None, "center") or data["interpolation"] not in [*_TIMM_FILTERS]:
        raise InputError(
            f"timm's crop_mode={short_repr(data.get('crop_mode'))} with interpolation="
            f"{short_repr(data['interpolation'])} is not implemented. Expected crop_mode 'center' and one of "
            f"{', '.join(_TIMM_FILTERS)}."
        )
    size = data["input_size"]
    if len(size) != 3 or size[1] != size[2]:  # timm resizes for an oblong crop in a way that is not implemented here
        raise InputError(f"timm's input_size={short_repr(size)} is not implemented. Expected [channels, side, side].")
    return {
        "size": {"shortest_edge": size[1]},
        "crop_size": {"height": size[1], "width": size[1]},
        "crop_pct": data.get("crop_pct") or 0.875,
        "resample": _TIMM_FILTERS[data["interpolation"]],
        "image_mean": data["mean"],
        "image_std": data["std"],
    }


def read(source: str | os.PathLike[str], **hub_options: Unpack[HubOptions]) -> Mapping[str, Any]:
    """The entries of the preprocessing saved in a folder, beside a file, or in a repository on the Hub.

    Raises MissingFileError if the file or the source is missing; `NotInCache` if the Hub cannot be reached to look;
    MissingDependencyError if the Hub is needed and huggingface_hub is not installed.
    """
    path, names = Path(source).expanduser(), (PREPROCESSOR_CONFIG, CONFIG)
    if path.exists():
        check_no_revision(path, hub_options.get("revision"))
        folder = path if path.is_dir() else path.parent
        candidates = filter(is_file, (folder / name for name in names))
    else:
        repository = Repository(str(source), names, **hub_options)
        # If config.json has no preprocessing, the second search raises NotInCache unless the other file is known to be
        # missing.
        candidates = filter(None, (repository.find(*wanted) for wanted in (names, names[:1])))
    for candidate in candidates:
        data = read_json(candidate, "an object, as PoolFormerImageProcessor(...).save_pretrained(folder) writes it")
        if candidate.name == PREPROCESSOR_CONFIG:
            return data
        if isinstance(timm := data.get("pretrained_cfg"), dict) and "interpolation" in timm:
            return timm
    raise MissingFileError(
        f"{source} has no {PREPROCESSOR_CONFIG}, and no config.json of timm with a pretrained_cfg. Expected one of "
        "them beside the weights, or PoolFormerImageProcessor.for_variant('caformer_s18') for a published network."
    )

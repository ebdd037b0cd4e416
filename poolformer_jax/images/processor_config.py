"""Where a model's preprocessing is written down, and in which dialects.

`transformers` writes preprocessor_config.json, and has renamed its entries over the years; `timm` writes a
`pretrained_cfg` into config.json. Both become fields of `PoolFormerImageProcessor`.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from poolformer_jax.errors import InputError, MissingFileError
from poolformer_jax.fields import INTEGER, short_repr
from poolformer_jax.hub import Repository

FILE = "preprocessor_config.json"
TIMM_FILE = "config.json"

# Entries of preprocessor_config.json about something other than the pixels.
_WITHOUT_EFFECT = frozenset(
    {
        "processor_class",
        "model_input_names",
        "do_resize_and_center_crop",
        "do_convert_rgb",
        "default_to_square",
        "data_format",
        "input_data_format",
        "return_tensors",
        "device",
        "disable_grouping",
    }
)
# transformers' names for this preprocessing; that of another model makes other pixels of the same entries.
_TYPES = (
    "PoolFormerImageProcessor",
    "PoolFormerImageProcessorFast",
    "PoolFormerImageProcessorPil",
    "PoolFormerFeatureExtractor",
)
_TIMM_FILTERS = {resampling.name.lower(): resampling.value for resampling in Image.Resampling}


def fields_from(data: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """The processor's fields for a preprocessor_config.json of any age, or for a `pretrained_cfg` of timm.

    Raises:
        ValueError: for entries that would change the pixels in a way that is not implemented here, all at once.
    """
    return _from_timm(data) if "interpolation" in data else _from_transformers(data, known)


def _from_transformers(data: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    fields = {
        name: value for name, value in data.items() if name in known and (value is not None or name == "crop_pct")
    }
    if "do_resize_and_center_crop" in data:  # one flag for both until 2022, and in the published files
        both = data["do_resize_and_center_crop"]
        fields = {"do_resize": both, "do_center_crop": both, **fields}
    if INTEGER.accepts(size := fields.get("size")):  # plain numbers, of that time too
        fields["size"] = {"shortest_edge": size}
    if INTEGER.accepts(size := fields.get("crop_size")):
        fields["crop_size"] = {"height": size, "width": size}
    types = ("image_processor_type", "feature_extractor_type")
    if wrong := [f"{name}={data[name]!r}" for name in types if data.get(name) not in (None, *_TYPES)]:
        raise InputError(
            f"This {FILE} is of another model's preprocessing, {', '.join(wrong)}, which makes other pixels. Expected "
            f"one of {', '.join(_TYPES)}, or no such entry."
        )
    unknown = [
        f"{name}={value!r}"
        for name, value in data.items()
        if value and name not in known and name not in (*_WITHOUT_EFFECT, *types) and not name.startswith("_")
    ]
    if unknown:
        raise InputError(
            f"These entries of {FILE} have no meaning here: {', '.join(unknown)}. Expected only: "
            f"{', '.join(sorted(known))}. If they do not change the pixels, remove them."
        )
    return fields


def _from_timm(data: Mapping[str, Any]) -> dict[str, Any]:
    """timm too scales the shorter edge to floor(size / crop_pct) and crops the middle, under other names."""
    if missing := [name for name in ("input_size", "mean", "std") if not isinstance(data.get(name), list | tuple)]:
        raise InputError(f"timm's pretrained_cfg has no list {', '.join(missing)}. Expected all of them.")
    if data.get("crop_mode") not in (None, "center") or str(data["interpolation"]) not in _TIMM_FILTERS:
        raise InputError(
            f"timm's crop_mode={data.get('crop_mode')!r} with interpolation={data['interpolation']!r} is not "
            f"implemented. Expected crop_mode 'center' and one of {', '.join(_TIMM_FILTERS)}."
        )
    size = data["input_size"]
    if len(size) != 3 or size[1] != size[2]:  # timm keeps a picture's shape for an oblong too, and nothing here does
        raise InputError(f"timm's input_size={short_repr(size)} is not implemented. Expected [channels, side, side].")
    return {
        "size": {"shortest_edge": size[1]},
        "crop_size": {"height": size[1], "width": size[1]},
        "crop_pct": data.get("crop_pct") or 0.875,
        "resample": _TIMM_FILTERS[data["interpolation"]],
        "image_mean": data["mean"],
        "image_std": data["std"],
    }


def read(source: str | os.PathLike[str], **hub_options: Any) -> Mapping[str, Any]:
    """The preprocessing that a folder, a file in it, or a repository on the Hub has written down.

    Raises:
        FileNotFoundError: if it has none, or there is nothing at `source`; `NotInCache` if only the Hub could tell.
        ModuleNotFoundError: if the Hub is asked for and huggingface_hub is not installed.
    """
    path, names = Path(source).expanduser(), (FILE, TIMM_FILE)
    if path.exists():
        folder = path if path.is_dir() else path.parent
        candidates = filter(Path.is_file, (folder / name for name in names))
    else:
        repository = Repository(str(source), names, **hub_options)
        # Where config.json does not tell it, it has to be known that there is no other file.
        candidates = filter(None, (repository.find(*wanted) for wanted in (names, names[:1])))
    for candidate in candidates:
        data = _json_object(candidate)
        if candidate.name == FILE:
            return data
        if isinstance(timm := data.get("pretrained_cfg"), dict) and "interpolation" in timm:
            return timm
    raise MissingFileError(
        f"{source} has no {FILE}, and no config.json of timm with a pretrained_cfg. Expected one of them beside the "
        "weights; PoolFormerImageProcessor(...).save_pretrained(folder) writes it."
    )


def _json_object(path: Path) -> dict[str, Any]:
    expected = "Expected an object, as PoolFormerImageProcessor(...).save_pretrained(folder) writes it"
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON ({error}). {expected}.") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} holds a {type(data).__name__}. {expected}.")
    return data

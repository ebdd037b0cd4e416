"""The forms, types and ranges of `PoolFormerImageProcessor`'s fields, as transformers has them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from poolformer_jax.errors import InputError
from poolformer_jax.fields import BOOLEAN, INTEGER, NUMBER, POSITIVE, STRING, FieldType, in_range, optional
from poolformer_jax.messages import short_repr

LARGEST_SIDE = 4096  # pixels that a file may ask for: 4096 x 4096 take 200 MB
_LARGEST_PIXEL = 1e30  # normalised


def pad_sides(value: Any) -> tuple[int, int] | None:
    """Height and width of `pad_size`, in one of transformers' forms; None for None."""
    if value is None:
        return None
    if set(sides := sides_of(value, square=True) or {}) != {"height", "width"}:
        raise InputError(f"pad_size={short_repr(value)}. Expected height and width, in pixels.")
    return sides["height"], sides["width"]


def sides_of(value: Any, *, square: bool = False) -> dict[str, int] | None:
    """{"height": ..., "width": ...} and so on for one of transformers' forms of a size; None for anything else."""
    if INTEGER.accepts(value):
        return {"height": int(value), "width": int(value)} if square else {"shortest_edge": int(value)}
    try:
        entries = list(value.items() if isinstance(value, Mapping) else value)  # transformers' SizeDict yields pairs
    except TypeError:
        return None
    if len(entries) == 2 and all(map(INTEGER.accepts, entries)):
        entries = list(zip(("height", "width"), entries, strict=True))
    is_pair = [isinstance(entry, tuple) and len(entry) == 2 and STRING.accepts(entry[0]) for entry in entries]
    if not all(is_pair) or not all(INTEGER.accepts(pixels) for _, pixels in entries):
        return None
    return {name: int(pixels) for name, pixels in entries}


def _size_field(*, square: bool) -> FieldType:
    return FieldType(
        'pixels by name such as {"shortest_edge": 224}, [height, width], or one number',
        lambda value: sides_of(value, square=square) is not None,
        lambda value: sides_of(value, square=square),
    )


def _filter(value: Any) -> int | None:
    """Pillow's number of a filter given as a number, a name, or an enum of Pillow or torchvision."""
    if INTEGER.accepts(value):
        return int(value)
    name = str(getattr(value, "value", value)).removesuffix("-exact").upper()
    return Image.Resampling[name].value if name in Image.Resampling.__members__ else None


def _is_per_channel(value: Any) -> bool:
    is_sequence = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
    return NUMBER.accepts(value) or (is_sequence and all(map(NUMBER.accepts, value)))


_PER_CHANNEL = FieldType(
    "a number, or a sequence of numbers, one per channel",
    _is_per_channel,
    lambda value: float(value) if NUMBER.accepts(value) else tuple(map(float, value)),
)
FIELD_TYPES: Mapping[str, FieldType] = {
    **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), BOOLEAN),
    **dict.fromkeys(("image_mean", "image_std"), _PER_CHANNEL),
    "size": _size_field(square=False),
    "crop_size": _size_field(square=True),
    "crop_pct": optional(NUMBER),
    "resample": FieldType(
        "the number or name of a filter of Pillow", lambda value: _filter(value) is not None, _filter
    ),
    "rescale_factor": NUMBER,
    "do_convert_rgb": optional(BOOLEAN),
}


def rules(processor: Any) -> list[tuple[str, object, str]]:
    """The rules for `check_rules` of a processor whose fields have the right types."""

    def sides(mapping: Mapping[str, int], *allowed: set[str]) -> bool:
        return set(mapping) in allowed and all(0 < side <= LARGEST_SIDE for side in mapping.values())

    two_sides, pixels = {"height", "width"}, f"of 1 to {LARGEST_SIDE} pixels"
    largest_share = max(processor.size.values(), default=0) / LARGEST_SIDE
    channels = processor.image_mean
    return [
        ("size", sides(processor.size, {"shortest_edge"}, two_sides), f"shortest_edge, or height and width, {pixels}"),
        ("crop_size", sides(processor.crop_size, two_sides), f"height and width, {pixels}"),
        (
            "crop_pct",
            processor.crop_pct is None or (0 < processor.crop_pct <= 1 and largest_share <= processor.crop_pct),
            f"None or a share in (0, 1] by which size becomes at most {LARGEST_SIDE} pixels",
        ),
        ("resample", processor.resample in set(Image.Resampling), "a number of Pillow's filters, 0 to 5"),
        ("image_mean", len(channels) in (1, 3), "one value per channel, of 1 or 3 channels"),
        ("image_std", len(processor.image_std) == len(channels), "the same number of values as image_mean"),
        ("image_std", all(std > 0 for std in processor.image_std), "positive values"),
        *in_range(processor, POSITIVE, "rescale_factor"),
        ("image_std", _keeps_black_from_white(processor), "values (and means) with which black and white stay apart"),
    ]


def _keeps_black_from_white(processor: Any) -> bool:
    """False if normalised pixels would be infinite, or all the same in float32."""
    white = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    ends = [(0.0, white)]
    if processor.do_normalize:
        pairs = [(mean, std) for mean, std in zip(processor.image_mean, processor.image_std) if std > 0]
        ends = [((0.0 - mean) / std, (white - mean) / std) for mean, std in pairs]
    return all(max(map(abs, pair)) < _LARGEST_PIXEL and np.float32(pair[0]) != np.float32(pair[1]) for pair in ends)

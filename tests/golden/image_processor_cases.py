"""Images and keywords with which the image processor is compared with that of `transformers`.

`transformers` refuses images that are not RGB unless do_convert_rgb=True, so every case has it.
"""

from pathlib import Path

import numpy as np
from PIL import Image

PHOTOGRAPH = Path(__file__).parent.parent / "images" / "chelsea.jpg"
# Small, and with odd sides.
SMALL = {"size": 32, "crop_size": 25, "do_convert_rgb": True}


def images():
    """name -> image, in the forms that both processors read: Pillow images and arrays."""
    photograph = Image.open(PHOTOGRAPH).resize((91, 61))
    colours = np.asarray(photograph)
    alpha = np.random.default_rng(0).integers(0, 256, (61, 91, 1), np.uint8)
    transparent = np.concatenate([colours, alpha], -1)
    return {
        "rgb": photograph,
        "upright": photograph.transpose(Image.Transpose.ROTATE_90),
        "grey": photograph.convert("L"),
        "palette": photograph.quantize(8),
        "rgba": Image.fromarray(transparent),
        "tiny": photograph.crop((0, 0, 5, 3)),
        "array": colours,
        "array_nchw": np.moveaxis(colours, -1, 0),
        "array_grey": colours[..., :1],
        "array_rgba": transparent,
        "batch": np.stack([colours, colours[::-1]]),
        "list": [photograph, np.moveaxis(colours, -1, 0)],
        "nested": [[photograph], [colours, photograph]],
        "whole_floats": colours.astype(np.float32),
        "integers": colours.astype(np.int64),
        "float16": (colours / 255).astype(np.float16),
        "float32": (colours / 255).astype(np.float32),
        "float64_nchw": np.moveaxis(colours / 255, -1, 0),
        "float64_rgba": transparent / 255,
    }


# With do_rescale=True, transformers divides these by 255 twice, and this library once.
UNIT_FLOATS = ("float16", "float32", "float64_nchw", "float64_rgba")

# keyword -> values in every form. None switches a step off.
FORMS = {
    "do_resize": [True, False, None],
    "size": [48, [40, 50], (50, 40), {"shortest_edge": 30}, {"height": 40, "width": 30}, {"height": 40, "width": 40}],
    "default_to_square": [True, False],
    "crop_pct": [0.9, 0.5, 1.0],
    "resample": [*range(6), *Image.Resampling],
    "do_center_crop": [True, False, None],
    "crop_size": [24, [20, 31], (70, 20), {"height": 19, "width": 20}, {"height": 101, "width": 102}],
    "do_rescale": [True, False, None],
    "rescale_factor": [1 / 127.5, 2.0],
    "do_normalize": [True, False, None],
    "image_mean": [0.5, [0.1, 0.2, 0.3], (0.3, 0.2, 0.1)],
    "image_std": [0.25, [0.1, 0.2, 0.3], (0.3, 0.2, 0.1)],
    "do_convert_rgb": [True],
    "do_pad": [True, False, None],
    "pad_size": [80, [70, 90], {"height": 70, "width": 90}],
    "disable_grouping": [True, False, None],
    "image_seq_length": [7, None],
    "device": ["cpu", None],
    "return_tensors": ["np", "pt", None],
    "input_data_format": [None],
}
# Several keywords that only matter together.
TOGETHER = [
    {"do_resize": False, "do_rescale": False},
    {"do_resize": False, "do_rescale": False, "do_center_crop": False, "do_normalize": False},
    {"do_resize": False, "do_center_crop": False, "do_pad": True, "pad_size": 100},
    {"size": 30, "default_to_square": True},
]


def keywords():
    """Every case: one keyword in one form, or several together."""
    single = [{name: value} for name, values in FORMS.items() for value in values]
    with_pad = [{**case, "do_pad": True} if "pad_size" in case else case for case in single]
    return [{**SMALL, **case} for case in [*with_pad, *TOGETHER]]


def is_comparable(name, case):
    """False where transformers divides floats from 0 to 1 by 255 twice."""
    return name not in UNIT_FLOATS or not case.get("do_rescale", True)


def sample(pixels):
    """24 values of a batch, from its first to its last."""
    return pixels.ravel()[np.linspace(0, pixels.size - 1, 24).astype(int)].astype(np.float32)

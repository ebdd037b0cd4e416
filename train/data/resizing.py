"""One part of an image in memory, resized to the network's input: by Pillow, or by faster code for the same filters.

Both compute Pillow's filters, which antialias: a smaller pixel is the weighted mean of all that it covers.
cykooz-resizer does so with the processor's vector instructions, in a quarter of the time. It resizes the height before
the width where Pillow does the reverse, and the 8 bits between the two steps make values differ: a fifth of them by one
level, and very few by more, where bicubic overshoots at a hard edge. Neither is nearer to the exact filter than the
other, and the pixels do not depend on the instructions that a processor has.

Pixels go to it and come back as bytes. It can reach into Pillow's memory, too: 5 % faster altogether, and a crash on
the day that Pillow keeps its images differently.
"""

import functools
import importlib.util
import math
from typing import Any, Literal

from PIL import Image

from train.data.crops import Box

Resizer = Literal["pillow", "simd"]
"""Pillow itself, or cykooz-resizer."""


@functools.cache
def choose_resizer(wanted: Literal["auto", "pillow", "simd"]) -> Resizer:
    """The resizer that is meant: "auto" is the fastest that is installed.

    Raises:
        ValueError: if it is not installed.
    """
    installed = importlib.util.find_spec("cykooz_resizer") is not None
    if wanted == "simd" and not installed:
        raise ValueError(
            'resizer="simd" needs cykooz-resizer, which is not installed. Install it (pip install cykooz-resizer), or '
            "let Pillow resize: --data.augment.resizer pillow."
        )
    return "simd" if installed and wanted != "pillow" else "pillow"


def resize_part(
    image: Image.Image, box: Box, size: int, resample: Image.Resampling, resizer: Resizer = "pillow"
) -> Image.Image:
    """One part of an image, resized to `size` x `size` pixels. Nothing from outside the part gets in at its edges.

    Args:
        image: of mode "RGB" or "L".
        box: the part.
        size: of the result, in pixels.
        resample: BILINEAR or BICUBIC.
        resizer: who resizes.
    """
    part = image.crop(box)
    if resizer == "pillow":
        return part.resize((size, size), resample)
    return _resize(part, size, resample)


def resize_within(
    image: Image.Image,
    box: tuple[float, float, float, float],
    size: int,
    resample: Image.Resampling,
    resizer: Resizer = "pillow",
) -> Image.Image:
    """The same for a part whose edges lie between pixels. At its edges the filter sees what is beyond."""
    if resizer == "pillow":
        return image.resize((size, size), resample, box=box)
    reach_x, reach_y = (filter_reach(box[side + 2] - box[side], size) for side in (0, 1))
    seen = Box(
        max(0, math.floor(box[0]) - reach_x),
        max(0, math.floor(box[1]) - reach_y),
        min(image.width, math.ceil(box[2]) + reach_x),
        min(image.height, math.ceil(box[3]) + reach_y),
    )
    inside = (box[0] - seen.left, box[1] - seen.top, box[2] - seen.left, box[3] - seen.top)
    return _resize(image.crop(seen), size, resample, inside)


def filter_reach(length: float, size: int) -> int:
    """How many pixels beyond a part of this length the filters look at most when they make it `size` pixels long."""
    return math.ceil(2 * max(1.0, length / size)) + 1  # bicubic looks two steps far


def _resize(
    image: Image.Image, size: int, resample: Image.Resampling, box: tuple[float, float, float, float] | None = None
) -> Image.Image:
    from cykooz_resizer import CropBox, ImageData, PixelType

    grey = image.mode == "L"
    kind, layout = (PixelType.U8, "L") if grey else (PixelType.U8x4, "RGBX")  # four bytes a pixel, as Pillow keeps RGB
    source = ImageData(*image.size, kind, image.tobytes("raw", layout))
    result = ImageData(size, size, kind)
    resizer, options = _resizer(resample)
    if box is not None:
        options = options.copy()
        options.crop_box = CropBox(box[0], box[1], box[2] - box[0], box[3] - box[1])
    resizer.resize(source, result, options)
    return Image.frombytes(image.mode, (size, size), result.get_buffer(), "raw", layout)


@functools.cache
def _resizer(resample: Image.Resampling) -> tuple[Any, Any]:
    """A resizer, which keeps memory for what lies between its two steps, and how it is asked for a filter."""
    from cykooz_resizer import FilterType, ResizeAlg, ResizeOptions, Resizer

    filters = {Image.Resampling.BILINEAR: FilterType.bilinear, Image.Resampling.BICUBIC: FilterType.catmull_rom}
    return Resizer(), ResizeOptions(ResizeAlg.convolution(filters[resample]), use_alpha=False)

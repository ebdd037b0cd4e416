"""Pixels in memory, resized to the network's input: by Pillow, or by faster code for the same filters.

Both compute Pillow's filters, which antialias: a smaller pixel is the weighted mean of all that it covers.
cykooz-resizer does so with the processor's vector instructions, in a quarter of the time. It resizes the height before
the width where Pillow does the reverse, and the 8 bits between the two steps make values differ: a fifth of them by one
level, and very few by more, where bicubic overshoots at a hard edge. Neither is nearer to the exact filter than the
other, and the pixels do not depend on the instructions that a processor has.
"""

import functools
import importlib.util
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from poolformer_jax.errors import InputError

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
        raise InputError(
            'resizer="simd" needs cykooz-resizer, which is not installed. Install it (pip install cykooz-resizer), or '
            "let Pillow resize: --data.augment.resizer pillow."
        )
    return "simd" if installed and wanted != "pillow" else "pillow"


def resize(
    pixels: UInt8[np.ndarray, "h w c"],
    size: int,
    resample: Image.Resampling,
    resizer: Resizer = "pillow",
) -> UInt8[np.ndarray, "size size c"]:
    """Pixels resized to `size` x `size`.

    Args:
        pixels: an image of 1 or 3 channels.
        size: of the result, in pixels.
        resample: BILINEAR or BICUBIC.
        resizer: who resizes.
    """
    if resizer == "pillow":
        return to_pixels(to_picture(pixels).resize((size, size), resample))
    from cykooz_resizer import ImageData, PixelType

    kind = PixelType.U8 if pixels.shape[-1] == 1 else PixelType.U8x3
    source = ImageData(pixels.shape[1], pixels.shape[0], kind, pixels.tobytes())
    result = ImageData(size, size, kind)
    filtering, options = _resizer(resample)
    filtering.resize(source, result, options)
    return np.frombuffer(result.get_buffer(), np.uint8).reshape(size, size, -1)


def to_pixels(picture: Image.Image) -> UInt8[np.ndarray, "h w c"]:
    """The pixels of a Pillow image of mode "RGB" or "L"."""
    return np.asarray(picture).reshape(picture.height, picture.width, -1)


def to_picture(pixels: UInt8[np.ndarray, "h w c"]) -> Image.Image:
    """A Pillow image of mode "RGB" or "L"."""
    return Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])


@functools.cache
def _resizer(resample: Image.Resampling) -> tuple[Any, Any]:
    """A resizer, which keeps memory for what lies between its two steps, and how it is asked for a filter."""
    from cykooz_resizer import FilterType, ResizeAlg, ResizeOptions, Resizer

    filters = {Image.Resampling.BILINEAR: FilterType.bilinear, Image.Resampling.BICUBIC: FilterType.catmull_rom}
    return Resizer(), ResizeOptions(ResizeAlg.convolution(filters[resample]), use_alpha=False)

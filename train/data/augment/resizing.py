"""Resizing of pixels to the network's input, by Pillow or by faster code with the same filters.

Pillow's filters antialias: a pixel of the result is the weighted mean of all pixels that it covers. cykooz-resizer
computes them with vector instructions, in a quarter of the time. It resizes height before width, Pillow width before
height, and both round to 8 bits in between. A fifth of the values differ by one level; a few differ by more, at hard
edges where bicubic overshoots. Neither is closer to the exact filter, and the pixels are the same on every processor.
"""

import functools
import importlib.util
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from poolformer_jax.errors import InputError

Resizer = Literal["pillow", "simd"]
"""Pillow, or cykooz-resizer (simd)."""


@functools.cache
def choose_resizer(wanted: Literal["auto", "pillow", "simd"]) -> Resizer:
    """The resizer to use: "auto" chooses the fastest that is installed. Raises ValueError if it is not installed."""
    installed = importlib.util.find_spec("cykooz_resizer") is not None
    if wanted == "simd" and not installed:
        raise InputError(
            'resizer="simd" needs cykooz-resizer, which is not installed. Install it (pip install cykooz-resizer), or '
            "use Pillow: --data.augment.resizer pillow."
        )
    return "simd" if installed and wanted != "pillow" else "pillow"


def resize(
    pixels: UInt8[np.ndarray, "h w c"],
    size: int,
    resample: Image.Resampling,
    resizer: Resizer = "pillow",
) -> UInt8[np.ndarray, "size size c"]:
    """Pixels resized to `size` x `size`."""
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
    """A resizer, which reuses its memory between calls, and the options for a filter."""
    from cykooz_resizer import FilterType, ResizeAlg, ResizeOptions, Resizer

    filters = {Image.Resampling.BILINEAR: FilterType.bilinear, Image.Resampling.BICUBIC: FilterType.catmull_rom}
    return Resizer(), ResizeOptions(ResizeAlg.convolution(filters[resample]), use_alpha=False)

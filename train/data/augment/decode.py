"""Decodes a crop of an image file and resizes it to the network's input.

`poolformer_jax.images.reading` reads any file. This file adds a faster path for crops of JPEGs that need neither
rotation nor colour conversion:

- It chooses the crop after reading only the header.
- If nvImageCodec is installed, it decodes little more than the crop (`jpeg_region`), with the same pixels.
- Scaled decoding, if allowed: a JPEG decoder can produce an image at 1/4 or 1/8 of its size with smaller inverse DCTs,
  which costs less than decoding the crop. It is used if the crop is at least that many times larger than the network's
  input, and the filter then shrinks by the rest. Pixels differ a little from a full decode. (1/2 would save nothing.)
"""

from collections.abc import Callable
from io import BytesIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from poolformer_jax.images import is_upright, open_image, raising_image_errors, read_image
from train.data.augment.crops import Box
from train.data.augment.jpeg_region import decode_region
from train.data.augment.resizing import Resizer, resize, to_pixels

_SCALES = (8, 4)
_FILE = "its file"  # the message names the example


def decode_crop(
    data: bytes,
    choose_box: Callable[[int, int], Box],
    size: int,
    resample: Image.Resampling,
    *,
    num_channels: int = 3,
    scaled_decoding: bool = False,
    resizer: Resizer = "pillow",
) -> UInt8[np.ndarray, "size size c"]:
    """Decodes one crop of an image, resized to `size` x `size` pixels.

    `choose_box` is called with the upright image's width and height. Pixels outside the crop have no effect.
    `scaled_decoding` allows decoding a JPEG at a fraction of its size, which Pillow then resizes. Raises ImageError if
    the image cannot be read.
    """
    pixels = None
    with raising_image_errors(_FILE, BytesIO(data)):
        image = open_image(BytesIO(data), _FILE)
        is_fast = _is_upright_jpeg(image, num_channels)
        if not is_fast:
            image = read_image(image, num_channels)
    box = choose_box(*image.size)
    if is_fast:
        if scaled_decoding and (scale := _scale(box, size)) > 1:
            return _decode_scaled(image, box, scale, size, resample)
        with raising_image_errors(_FILE):
            pixels = decode_region(data, box, num_channels)
            if pixels is None:  # Pillow decides whether the file is damaged
                image.load()
    return resize(to_pixels(image.crop(box)) if pixels is None else pixels, size, resample, resizer)


def _is_upright_jpeg(image: Image.Image, num_channels: int) -> bool:
    return image.format == "JPEG" and image.mode == ("L" if num_channels == 1 else "RGB") and is_upright(image)


def _scale(box: Box, size: int) -> int:
    """The divisor of the image's size for scaled decoding; 1 for none."""
    excess = min(box.width, box.height) // size
    return next((scale for scale in _SCALES if excess >= scale), 1)


def _decode_scaled(
    image: Image.Image, box: Box, scale: int, size: int, resample: Image.Resampling
) -> UInt8[np.ndarray, "size size c"]:
    width, height = image.size
    with raising_image_errors(_FILE):
        drafted = image.draft(None, (width // scale, height // scale))
        image.load()
    # The decoder rounds the size up, so that position x moves to x / scale for any size.
    divisor = 1 if drafted is None else width / drafted[1][2]
    crop = (box.left / divisor, box.top / divisor, box.right / divisor, box.bottom / divisor)
    return to_pixels(image.resize((size, size), resample, crop))

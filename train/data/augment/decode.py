"""From the bytes of an image file to the pixels of one part of it, at the network's size, as cheaply as possible.

What a file may hold and how it becomes RGB or greyscale is the library's business (`poolformer_jax.images.reading`).
This is the short cut for training's random parts of JPEG photographs that are upright and in the wanted colours:

- Only the header is read before the part is chosen.
- Where nvImageCodec is installed, the part is decoded and little else (`jpeg_region`). The pixels are those of the long
  way.
- Scaled decoding, where it is allowed: a JPEG decoder can produce an image at 1/4 or 1/8 of its size for less than the
  price of the part (it computes smaller inverse DCTs). It is used where the part is at least that many times larger
  than the network's input, so detail is never made up: the filter then shrinks by what is left. The pixels differ a
  little from those of a full decode. (At 1/2 it would save nothing.)
"""

from collections.abc import Callable
from io import BytesIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from poolformer_jax.images.reading import ImageError, is_upright, read_image, reading
from train.data.augment.crops import Box
from train.data.augment.jpeg_region import decode_region
from train.data.augment.resizing import Resizer, resize, to_pixels

_SCALES = (8, 4)
_FILE = "its file"  # of the example that a message names


def decode_part(
    data: bytes,
    choose_box: Callable[[int, int], Box],
    size: int,
    resample: Image.Resampling,
    *,
    num_channels: int = 3,
    scaled_decoding: bool = False,
    resizer: Resizer = "pillow",
) -> UInt8[np.ndarray, "size size c"]:
    """Decodes one part of an image, resized to `size` x `size` pixels.

    Args:
        data: the bytes of an image file of any format that Pillow reads.
        choose_box: called with the upright image's width and height.
        size: of the result, in pixels.
        resample: the filter.
        num_channels: 3 for RGB, 1 for greyscale.
        scaled_decoding: whether a JPEG may be decoded at a fraction of its size, which Pillow then resizes.
        resizer: who resizes otherwise. Nothing outside the part gets in at its edges.

    Raises:
        ImageError: if the image cannot be read.
    """
    pixels = None
    with reading(_FILE):
        image = _open(data)
        takes_part = _is_upright_jpeg(image, num_channels)
        if not takes_part:
            image = read_image(image, num_channels)
    box = choose_box(*image.size)
    if takes_part:
        if scaled_decoding and (scale := _scale(box, size)) > 1:
            return _decode_scaled(image, box, scale, size, resample)
        with reading(_FILE):
            pixels = decode_region(data, box, num_channels)
            if pixels is None:  # about a damaged file Pillow has the last word
                image.load()
    return resize(to_pixels(image.crop(box)) if pixels is None else pixels, size, resample, resizer)


def _open(data: bytes) -> Image.Image:
    """The file with its header read."""
    image = Image.open(BytesIO(data))
    limit = Image.MAX_IMAGE_PIXELS  # up to twice as many pixels Pillow only warns
    if limit is not None and image.width * image.height > limit:
        size = f"{image.width} x {image.height} pixels"
        raise ImageError(f"{size} are more than PIL.Image.MAX_IMAGE_PIXELS, {limit}")
    return image


def _is_upright_jpeg(image: Image.Image, num_channels: int) -> bool:
    return image.format == "JPEG" and image.mode == ("L" if num_channels == 1 else "RGB") and is_upright(image)


def _scale(box: Box, size: int) -> int:
    """What the decoder may divide the image's size by."""
    excess = min(box.width, box.height) // size
    return next((scale for scale in _SCALES if excess >= scale), 1)


def _decode_scaled(
    image: Image.Image, box: Box, scale: int, size: int, resample: Image.Resampling
) -> UInt8[np.ndarray, "size size c"]:
    width, height = image.size
    with reading(_FILE):
        drafted = image.draft(None, (width // scale, height // scale))
        image.load()
    # The decoder rounds its size up, so that what was at x is at x / scale whatever the size.
    divisor = 1 if drafted is None else width / drafted[1][2]
    part = (box.left / divisor, box.top / divisor, box.right / divisor, box.bottom / divisor)
    return to_pixels(image.resize((size, size), resample, part))

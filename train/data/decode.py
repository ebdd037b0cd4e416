"""From the bytes of an image file to the pixels of one part of it, at the network's size, as cheaply as possible.

What a file may hold and how it becomes RGB or greyscale is the library's business (`poolformer_jax.image_reading`).
For training's random parts of JPEG photographs there are short cuts, which give the same pixels. Only the header is
read before the part is chosen. Of an upright JPEG in the wanted colours the part is decoded and little else:

- where it has restart markers, the part is cut from the file before it is decoded (`restart_jpeg`);
- where nvImageCodec is installed, it decodes nothing but the part (`jpeg_region`). Pillow decodes all.
"""

from collections.abc import Callable
from io import BytesIO

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

from poolformer_jax.image_reading import ImageError, read_image
from train.data.crops import Box
from train.data.jpeg_header import JpegHeader
from train.data.jpeg_region import decode_region
from train.data.resizing import Resizer, resize, to_pixels
from train.data.restart_jpeg import RestartJpeg


def decode_part(
    data: bytes,
    choose_box: Callable[[int, int], Box],
    size: int,
    resample: Image.Resampling,
    *,
    num_channels: int = 3,
    resizer: Resizer = "pillow",
) -> UInt8[np.ndarray, "size size c"]:
    """Decodes one part of an image, resized to `size` x `size` pixels. Nothing outside the part gets in at its edges.

    Args:
        data: the bytes of an image file of any format that Pillow reads.
        choose_box: called with the upright image's width and height.
        size: of the result, in pixels.
        resample: the filter.
        num_channels: 3 for RGB, 1 for greyscale.
        resizer: who resizes.

    Raises:
        ImageError: if the image cannot be read.
    """
    return resize(_decode(data, choose_box, num_channels), size, resample, resizer)


def _decode(data: bytes, choose_box: Callable[[int, int], Box], num_channels: int) -> UInt8[np.ndarray, "h w c"]:
    header = JpegHeader.read(data)
    if header is None or header.num_channels != num_channels or (header.metadata and not _is_upright(data)):
        image = read_image(data, num_channels)
        return to_pixels(image.crop(choose_box(*image.size)))
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and header.width * header.height > limit:
        raise ImageError(f"{header.width} x {header.height} pixels are more than PIL.Image.MAX_IMAGE_PIXELS, {limit}")
    box = choose_box(header.width, header.height)
    if (jpeg := RestartJpeg.read(data, header)) is not None:
        data, box = jpeg.cut(box)
    pixels = decode_region(data, box, num_channels)
    return to_pixels(read_image(data, num_channels).crop(box)) if pixels is None else pixels


def _is_upright(data: bytes) -> bool:
    """Whether the file does not ask for the image to be turned."""
    with Image.open(BytesIO(data)) as image:
        return bool(image.getexif().get(ExifTags.Base.Orientation, 1) == 1)

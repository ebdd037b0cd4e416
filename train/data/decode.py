"""From the bytes of an image file to the pixels of one part of it, at the network's size, as cheaply as Pillow can.

What a file may hold and how it becomes RGB or greyscale is the library's business (`poolformer_jax.image_reading`);
this is the short cut for training's random parts of JPEG photographs:

- Only the header is read before the part is chosen.
- An upright JPEG in the wanted colours is decoded down to the part's last row (`partial_jpeg`) and cut from the
  decoder's own memory, without the copies that turning and converting make. The pixels are those of the long way.
- Where a JPEG has restart markers, the part is cut from the file before it is decoded (`restart_jpeg`). Same pixels.
- Scaled decoding, where it is allowed: a JPEG decoder can produce an image at 1/2, 1/4 or 1/8 of its size for less
  than the price of the whole (it computes smaller inverse DCTs). It is used where the part is at least that many times
  larger than the network's input, so detail is never made up: the filter then shrinks by what is left. The pixels
  differ a little from those of a full decode.
"""

import math
from collections.abc import Callable
from io import BytesIO

from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from poolformer_jax.image_reading import ImageError, read_image
from train.data.crops import Box
from train.data.partial_jpeg import decode_rows
from train.data.resizing import Resizer, filter_reach, resize_part, resize_within
from train.data.restart_jpeg import RestartJpeg

_SCALES = (8, 4, 2)


def decode_part(
    data: bytes,
    choose_box: Callable[[int, int], Box],
    size: int,
    resample: Image.Resampling,
    *,
    num_channels: int = 3,
    scaled_decoding: bool = False,
    resizer: Resizer = "pillow",
) -> Image.Image:
    """Decodes one part of an image, resized to `size` x `size` pixels.

    Args:
        data: the bytes of an image file of any format that Pillow reads.
        choose_box: called with the upright image's width and height.
        size: of the result, in pixels.
        resample: the filter.
        num_channels: 3 for mode "RGB", 1 for mode "L".
        scaled_decoding: whether a JPEG may be decoded at a fraction of its size.
        resizer: who resizes.

    Raises:
        ImageError: if the image cannot be read.
    """
    mode = "L" if num_channels == 1 else "RGB"
    try:
        jpeg = RestartJpeg.read(data)
        if jpeg is not None and jpeg.mode == mode and not jpeg.header.metadata:
            return _decode_restart_jpeg(jpeg, choose_box, size, resample, scaled_decoding, resizer)
        with Image.open(BytesIO(data)) as image:
            if image.format == "JPEG" and image.mode == mode and _is_upright(image):
                if jpeg is not None:
                    return _decode_restart_jpeg(jpeg, choose_box, size, resample, scaled_decoding, resizer)
                box = _choose(choose_box, *image.size)
                scale = _scale(box, size) if scaled_decoding else 1
                return _decode_box(image, len(data), box, scale, size, resample, resizer)
            upright = read_image(image, num_channels)
    except ImageError:
        raise
    except UnidentifiedImageError as error:  # whose message shows an object's address
        raise ImageError("not an image that Pillow can read: it is of no format that it knows") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ... for foreign bytes
        raise ImageError(f"not an image that Pillow can read: {error}") from error
    return resize_part(upright, choose_box(*upright.size), size, resample, resizer)


def _decode_restart_jpeg(
    jpeg: RestartJpeg,
    choose_box: Callable[[int, int], Box],
    size: int,
    resample: Image.Resampling,
    scaled_decoding: bool,
    resizer: Resizer,
) -> Image.Image:
    box = _choose(choose_box, *jpeg.size)
    scale = _scale(box, size) if scaled_decoding else 1
    # Decoded at a fraction, pixels are resized together with those beyond the box's edges.
    reach = 0 if scale == 1 else scale * (filter_reach(max(box.width, box.height) / scale, size) + scale)
    part = jpeg.cut(box, reach)
    image = Image.frombytes(
        jpeg.mode, (-(-part.width // scale), -(-part.height // scale)), part.data, "jpeg", jpeg.mode, "", scale, 0
    )
    box = Box(box.left - part.left, box.top - part.top, box.right - part.left, box.bottom - part.top)
    if scale == 1:
        return resize_part(image, box, size, resample, resizer)
    return resize_within(image, tuple(edge / scale for edge in box), size, resample, resizer)


def _choose(choose_box: Callable[[int, int], Box], width: int, height: int) -> Box:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ImageError(f"{width} x {height} pixels are more than PIL.Image.MAX_IMAGE_PIXELS, {limit}")
    return choose_box(width, height)


def _scale(box: Box, size: int) -> int:
    """What the decoder may divide the image's size by."""
    excess = min(box.width, box.height) // size
    return next((scale for scale in _SCALES if excess >= scale), 1)


def _decode_box(
    image: ImageFile.ImageFile,
    file_size: int,
    box: Box,
    scale: int,
    size: int,
    resample: Image.Resampling,
    resizer: Resizer,
) -> Image.Image:
    if scale == 1:
        decode_rows(image, box.bottom, file_size)
        return resize_part(image, box, size, resample, resizer)
    width, height = image.size
    drafted = image.draft(None, (width // scale, height // scale))
    # The decoder rounds its size up, so that what was at x is at x / scale whatever the size.
    divisor = 1 if drafted is None else width / drafted[1][2]
    part = (box.left / divisor, box.top / divisor, box.right / divisor, box.bottom / divisor)
    # Beyond the part's lower edge the filter looks at a few rows more.
    reach = math.ceil(part[3]) + filter_reach(part[3] - part[1], size)
    decode_rows(image, min(reach, image.height), file_size)
    return resize_within(image, part, size, resample, resizer)


def _is_upright(image: Image.Image) -> bool:
    """Whether the file does not ask for the image to be turned. Without EXIF or XMP there is nothing to parse."""
    if not any(name in image.info for name in ("exif", "xmp")):
        return True
    return bool(image.getexif().get(ExifTags.Base.Orientation, 1) == 1)

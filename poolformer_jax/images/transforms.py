"""The steps of preprocessing that work on arrays [height, width, channels].

Source: transformers, image_transforms.py, and `PilBackend` in image_processing_backends.py.
"""

import math
from collections.abc import Sequence

import ml_dtypes
import numpy as np
from jaxtyping import Num, Shaped, UInt8
from PIL import Image

from poolformer_jax.images.reading import ImageError, ImageLike, as_numpy, channels_last, decode

# ITU-R 601, as Pillow converts colours to greyscale.
_LUMA = (0.299, 0.587, 0.114)


def on_white(image: ImageLike, input_data_format: str | None) -> tuple[ImageLike, str | None]:
    """The image with white behind its transparency, and its data format.

    As in transformers, only Pillow images and arrays can be transparent; files lose their transparency when read.
    """
    if isinstance(image, Image.Image):
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            colours = decode(image, "the Pillow image").convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
        return image, input_data_format
    if not hasattr(image, "__array__"):
        return image, input_data_format
    array = channels_last(as_numpy(image), input_data_format)
    if array.shape[-1] == 4:
        whole = np.issubdtype(array.dtype, np.integer)
        white = (65535 if array.dtype == np.uint16 else 255) if whole else 1.0
        alpha = array[..., 3:] / white
        blended = alpha * array[..., :3] + (1 - alpha) * white
        array = (np.round(blended) if whole else blended).astype(array.dtype)
    return array, "channels_last"


def unscaled_array(
    image: ImageLike, input_data_format: str | None, do_rescale: bool
) -> Num[np.ndarray, "h w c"] | None:
    """The array [h, w, c] if its values are used as they are, as in transformers; None if `read_image` reads it.

    `read_image` reads 8 bits, 16 bits, and floats from 0 to 1 that `do_rescale` expects to be 8 bits. transformers
    would rescale these floats a second time, to pixels that are all nearly black.
    """
    if isinstance(image, Image.Image) or not hasattr(image, "__array__"):
        return None
    array = as_numpy(image)
    if array.dtype == ml_dtypes.bfloat16:  # np.issubdtype does not count it as floating
        array = array.astype(np.float32)
    if array.dtype.kind not in "fiu" or array.dtype in (np.uint8, np.uint16) or not array.size:
        return None
    is_float = array.dtype.kind == "f"
    low, high = float(array.min()), float(array.max())
    if is_float and do_rescale and np.rint(low * 255) >= 0 and np.rint(high * 255) <= 255:
        return None
    return channels_last(array if is_float else array.astype(np.float32), input_data_format)


def to_8_bits(array: Num[np.ndarray, "h w c"]) -> tuple[UInt8[np.ndarray, "h w c"], bool]:
    """The array in 8 bits, which Pillow resizes, and whether it was multiplied by 255.

    Whole numbers from 0 to 255 stay; other floats from 0 to 1 are multiplied by 255 and rounded down. Raises ImageError
    for other values.
    """
    low, high = float(array.min()), float(array.max())
    if np.allclose(array, np.trunc(array)):
        if low >= 0 and high <= 255:
            return array.astype(np.uint8), False
    elif low >= 0 and high <= 1:
        return (array.astype(np.float64) * 255).astype(np.float32).astype(np.uint8), True
    raise ImageError(
        f"An image array has values from {low:.9g} to {high:.9g}. Expected 0 to 1, or whole numbers from 0 to 255, "
        "because images are resized in 8 bits. Pass pixels that are already normalised to the model directly."
    )


def to_channels(array: Num[np.ndarray, "h w _"], channels: int) -> Num[np.ndarray, "h w c"]:
    """Greyscale repeated, transparency dropped, or the luma of colours: as `read_image` converts images."""
    if channels == 1:
        return array if array.shape[-1] == 1 else (array[..., :3] @ np.asarray(_LUMA, array.dtype))[..., None]
    return np.repeat(array, 3, -1) if array.shape[-1] == 1 else array[..., :3]


def center_crop(
    pixels: Num[np.ndarray, "h w c"], height: int, width: int, to_even: bool = False
) -> Num[np.ndarray, "h2 w2 c"]:
    """The middle [height, width]. Outside of the picture it is black (0 before normalisation).

    If the crop would begin at half a pixel, it begins at the pixel before; with `to_even` at the even one of the two.
    """
    original_height, original_width, channels = pixels.shape
    result = np.zeros((height, width, channels), pixels.dtype)
    source_rows, target_rows = _middle(original_height, height, to_even)
    source_columns, target_columns = _middle(original_width, width, to_even)
    result[target_rows, target_columns] = pixels[source_rows, source_columns]
    return result


def _middle(length: int, wanted: int, to_even: bool) -> tuple[slice, slice]:
    """The slice of `length` pixels to copy, and the slice of `wanted` pixels to copy it to."""
    if length >= wanted:
        start = round((length - wanted) / 2) if to_even else (length - wanted) // 2
        return slice(start, start + wanted), slice(0, wanted)
    # transformers puts the larger half of the padding first, and then crops the padded picture.
    start = math.ceil((wanted - length) / 2)
    return slice(0, length), slice(start, start + length)


def pad(images: Sequence[Num[np.ndarray, "_ _ c"]], size: tuple[int, int] | None) -> list[Shaped[np.ndarray, "h w c"]]:
    """The images with zeros below and to the right, to `size` (height, width) or the largest height and width.

    Raises ImageError if an image is larger than `size`.
    """
    largest = max(image.shape[0] for image in images), max(image.shape[1] for image in images)
    height, width = size or largest
    if largest[0] > height or largest[1] > width:
        raise ImageError(f"An image of {largest[1]} x {largest[0]} pixels is larger than pad_size {width} x {height}.")
    return [np.pad(image, ((0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0))) for image in images]

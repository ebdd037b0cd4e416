"""One picture, however it arrives, as the 8-bit Pillow image that preprocessing starts from.

The rules, all of which a test holds. A picture that none of them covers is refused, never guessed:

- Paths, bytes and Pillow images are turned upright by their EXIF orientation. Of an animation the first frame counts.
- Greyscale is repeated over red, green and blue. A network of one channel gets the luma of a colour picture instead.
- Palettes are resolved to their colours. Transparency (RGBA, LA, a palette's transparent entry) is dropped and the
  colour below it kept, as Pillow's `convert("RGB")` does and with it `transformers` and `timm`.
- CMYK and YCbCr are converted by Pillow without a colour profile.
- Of 16-bit samples the high byte is kept, which is what Pillow itself does with 16-bit colour. 32-bit integers
  and floats (modes "I", "F") have no known range and are refused.
- Arrays are [h, w], [h, w, c] or [c, h, w] of 1, 3 or 4 channels. Where both ends could be the channels,
  `input_data_format` has to say which. uint8 holds 0 to 255, uint16 0 to 65535, floating point 0 to 1 (rounded to
  8 bits, because Pillow resizes 8 bits; what another library's rounding left just outside still counts). Anything
  else is refused.
- Truncated and damaged files are refused, and so is a picture of more than `PIL.Image.MAX_IMAGE_PIXELS` pixels, and
  EPS and WMF, which are programs to draw a picture (Pillow would run Ghostscript on them).
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from poolformer_jax.errors import InputError

# Whatever `read_image` accepts; a jax.Array counts as an array. Spelled Any, because np.ndarray and the rest of the
# world's arrays share no type.
ImageLike = Any

_CHANNELS = (1, 3, 4)
_DRAWINGS = ("EPS", "WMF")
DATA_FORMATS = ("channels_last", "channels_first")
# Formats that Pillow opens and makes no pixels of: drawings that other programs would have to draw, containers of
# measurements, and films.
_WITHOUT_PIXELS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})


class ImageError(InputError):
    """A picture that cannot be read, with what is wrong with it."""


def printable(name: str | bytes | os.PathLike[str]) -> str:
    """A file's name as text that can be written anywhere: bytes that are not UTF-8 become `\\xe9` and the like."""
    return os.fsencode(name).decode(errors="backslashreplace")


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The endings of files that Pillow and its plugins read here, in lower case, with their dots."""
    formats = Image.registered_extensions()  # of which Pillow only writes some, PDF for one
    return frozenset(ending for ending, name in formats.items() if name in Image.OPEN and name not in _WITHOUT_PIXELS)


def read_image(image: ImageLike, num_channels: int = 3, input_data_format: str | None = None) -> Image.Image:
    """The picture as a Pillow image of mode "RGB", or "L" for a network of one channel.

    Args:
        image: a path, the bytes of a file, a Pillow image, or an array; the module's docstring has the rules.
        num_channels: 3 or 1.
        input_data_format: "channels_last" or "channels_first" for arrays, None to tell by their shape.

    Raises:
        ImageError: if the picture is not one that the rules cover.
    """
    if isinstance(image, str | os.PathLike):
        upright = _open(image, repr(str(os.fspath(image))))
    elif isinstance(image, bytes | bytearray | memoryview):
        upright = _open(BytesIO(image), f"the {len(image)} bytes given")
    elif isinstance(image, Image.Image):
        upright = _decode(image, "the Pillow image")
        if upright is image:
            upright = image.copy()  # its owner may go on to the next frame
    elif hasattr(image, "__array__"):
        upright = _from_array(_as_numpy(image), input_data_format)
    else:
        hint = " Of an open file, give what its .read() returns." if hasattr(image, "read") else ""
        raise ImageError(
            f"An image of type {type(image).__name__} cannot be read. Expected a path, the bytes of an image file, "
            f"a Pillow image, or an array.{hint}"
        )
    return _to_mode(upright, "L" if num_channels == 1 else "RGB")


def is_upright(image: Image.Image) -> bool:
    """Whether its EXIF does not ask for the picture to be turned."""
    return bool(image.getexif().get(ExifTags.Base.Orientation, 1) == 1)


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Around nothing but Pillow's work on a file: whatever goes wrong there is the file's fault.

    Raises:
        ImageError: which calls the file `name`, for every error but one of ours or a lack of memory.
    """
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image that Pillow can read: it is of no format that it knows.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(_too_large(name)) from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ... for foreign bytes
        raise ImageError(f"{name} is not an image that Pillow can read: {error}") from error


def _open(file: str | os.PathLike[str] | BytesIO, name: str) -> Image.Image:
    with reading(name):
        if not isinstance(file, BytesIO) and not Path(file).is_file():
            hint = " Addresses are not downloaded: give the bytes instead." if "://" in name else ""
            raise ImageError(f"There is no image file {name}.{hint}")
        with Image.open(file) as image:
            return _decode(image, name)


def _decode(image: Image.Image, name: str) -> Image.Image:
    """Every pixel in memory, and the right way up."""
    # Pillow only warns from here up to twice as many pixels, and warnings are lost in threads.
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ImageError(_too_large(f"{name}, {image.width} x {image.height} pixels,"))
    if image.format in _DRAWINGS:
        raise ImageError(f"{name} is a drawing ({image.format}). Expected pixels: convert it to PNG first.")
    if image.width == 0 or image.height == 0:
        raise ImageError(f"{name} is {image.width} x {image.height} pixels. Expected at least one pixel.")
    if image.mode == "I" and image.format == "PPM":  # Pillow scales every sample of more than 8 bits to 16
        image = Image.fromarray(np.asarray(image).astype(np.uint16))
    try:
        image.load()
        return image if is_upright(image) else ImageOps.exif_transpose(image)  # which copies upright ones
    except MemoryError:
        raise
    except Exception as error:  # see `reading`
        raise ImageError(f"{name} is truncated or damaged: {error}") from error


def _as_numpy(array: Any) -> Shaped[np.ndarray, "..."]:
    try:
        return np.asarray(array)
    except MemoryError:
        raise
    except Exception as error:  # of another library: PyTorch raises RuntimeError for an array that needs gradients
        raise ImageError(f"A {type(array).__name__} does not become a NumPy array: {error}") from error


def _too_large(name: str) -> str:
    return (
        f"{name} has more than {Image.MAX_IMAGE_PIXELS} pixels, which could be an attack by decompression. "
        "If you trust it, raise PIL.Image.MAX_IMAGE_PIXELS."
    )


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ImageError(
            f"An image of mode {image.mode!r} (32-bit greyscale) has no known range. Expected 8 or 16 bits a sample: "
            'scale it yourself and convert it to mode "L".'
        )
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the direct way to RGB warns
    if image.mode == mode:
        return image
    try:
        return image.convert(mode)
    except ValueError as error:
        raise ImageError(
            f"An image of mode {image.mode!r} cannot be converted to {mode}: {error}. Convert it to RGB yourself."
        ) from error


def _from_array(array: Shaped[np.ndarray, "..."], data_format: str | None) -> Image.Image:
    pixels = _to_uint8(_channels_last(array, data_format))
    if 0 in pixels.shape:
        raise ImageError(f"An array of shape {array.shape} holds no pixel. Expected at least one.")
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _channels_last(array: Shaped[np.ndarray, "..."], data_format: str | None) -> Shaped[np.ndarray, "h w c"]:
    expected = "Expected one image as [h, w], [h, w, c] or [c, h, w] with 1, 3 or 4 channels"
    if data_format not in (None, *DATA_FORMATS):
        raise ImageError(f"input_data_format={data_format!r}. Expected None, {' or '.join(map(repr, DATA_FORMATS))}.")
    if array.ndim == 2:
        return array[..., None]
    if array.ndim != 3:
        raise ImageError(f"An array of shape {array.shape} is no image. {expected}.")
    could_be = {"channels_last": array.shape[-1] in _CHANNELS, "channels_first": array.shape[0] in _CHANNELS}
    if data_format is None:
        if all(could_be.values()):
            raise ImageError(
                f"An array of shape {array.shape} could have its channels first or last. "
                'Say input_data_format="channels_last" or "channels_first", or give a Pillow image.'
            )
        data_format = next((name for name, possible in could_be.items() if possible), "channels_last")
    if not could_be[data_format]:
        raise ImageError(f"An array of shape {array.shape} is no image with {data_format}. {expected}.")
    return array if data_format == "channels_last" else np.moveaxis(array, 0, -1)


def _to_uint8(array: Shaped[np.ndarray, "h w c"]) -> Shaped[np.ndarray, "h w c"]:
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.uint16:
        return (array >> 8).astype(np.uint8)
    if array.dtype == ml_dtypes.bfloat16:  # none of NumPy's own floating-point types
        array = array.astype(np.float32)
    if np.issubdtype(array.dtype, np.floating):
        low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
        if not (np.rint(low * 255) >= 0 and np.rint(high * 255) <= 255):  # also where one is NaN
            raise ImageError(
                f"A floating-point image holds values from {low:.9g} to {high:.9g}. Expected 0 to 1; for 0 to 255 pass "
                "uint8. Pixels that are normalised already go to the model directly."
            )
        return np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    raise ImageError(
        f"An image array of type {array.dtype} has no known range. Expected uint8, uint16, or floats 0 to 1."
    )

"""Reads one picture, in any form, into the 8-bit Pillow image that preprocessing starts from.

Tests cover each of these rules. A picture that no rule covers is refused:

- Paths, bytes and Pillow images are rotated by their EXIF orientation, even if other entries of the EXIF are damaged.
  The first frame of an animation is read.
- Greyscale is repeated over red, green and blue. A network with one channel gets the luma of a colour picture.
- Palettes are converted to their colours. Transparency (RGBA, LA, a palette's transparent entry) is dropped, and the
  colour beneath it kept, as by Pillow's `convert("RGB")` in `transformers` and `timm`.
- CMYK and YCbCr are converted by Pillow without a colour profile.
- 16-bit samples are reduced to their high byte, as Pillow does with 16-bit colour. 32-bit integers and floats (modes
  "I", "F") have no known range and are refused.
- Arrays are [h, w], [h, w, c] or [c, h, w] with 1, 3 or 4 channels. If both the first and the last axis could be the
  channels, `input_data_format` is required. uint8 ranges from 0 to 255, uint16 from 0 to 65535, floating point from 0
  to 1 (rounded to 8 bits, because Pillow resizes 8 bits; values that round to 0 or 1 are accepted).
- Files are read in the formats of `_FORMATS`. Pillow reads thirty others, and of some a small file takes gigabytes or
  minutes: JPEG 2000 with precincts of one pixel, FITS. They can be given as Pillow images, except EPS and WMF, which
  are programs that draw a picture (Pillow would run Ghostscript on them).
- Truncated and damaged files are refused, pictures with more than `PIL.Image.MAX_IMAGE_PIXELS` pixels, and JPEGs whose
  many scans would take minutes.
"""

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from poolformer_jax.errors import InputError
from poolformer_jax.fields import is_local
from poolformer_jax.files import why_unreadable
from poolformer_jax.images.orientation import turn_upright
from poolformer_jax.messages import printable

# Anything that `read_image` accepts. Any, because the arrays of NumPy, jax and other libraries have no common type.
ImageLike = Any

_CHANNELS = (1, 3, 4)
_LARGEST_FILE = 1 << 28  # bytes: the most pixels that Pillow reads, in 24 bits without compression
_DRAWINGS = ("EPS", "WMF")
DATA_FORMATS = ("channels_last", "channels_first")
# Pillow's names, in the order in which they are tried. TGA is last because its files do not begin with its name.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "HEIF", "TGA")
_READ = "JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, AVIF, HEIC or TGA"
# libtiff's limit for JPEGs inside a TIFF. Encoders write about 10. A scan of 12 bytes decodes the whole picture anew.
_MOST_SCANS = 100
_START_OF_SCAN = b"\xff\xda"
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # of a JPEG; the others occur inside a scan
_TIFF_TILE = (322, 323)  # the tags of a tile's width and height

# Photos of phones, which the plugin pillow-heif reads: the suffixes of their names, and their brands (ISO 23008-12).
HEIF_SUFFIXES = frozenset({".heic", ".heics", ".heif", ".heifs", ".hif"})
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def _register_heif() -> None:
    """Lets Pillow read HEIC photos if the extra `heif` is installed."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()


_register_heif()


class ImageError(InputError):
    """A picture that cannot be read; the message says why."""


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of files that `read_image` can read, in lower case, with their dots."""
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in _formats())


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `_FORMATS` that Pillow and pillow-heif can read as they are installed."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def read_image(image: ImageLike, num_channels: int = 3, input_data_format: str | None = None) -> Image.Image:
    """The picture as a Pillow image of mode "RGB", or "L" for a network of one channel.

    The module's docstring has the rules. Raises ImageError if no rule covers the picture.
    """
    if isinstance(image, str | os.PathLike):
        upright = _open(image, printable(repr(os.fspath(image)), 400))
    elif isinstance(image, bytes | bytearray | memoryview):
        upright = _open(BytesIO(image), f"the {len(image)} bytes given")
    elif isinstance(image, Image.Image):
        upright = decode(image, "the Pillow image")
        if upright is image:
            upright = image.copy()  # the caller may change it or seek to another frame
    elif hasattr(image, "__array__"):
        upright = _from_array(as_numpy(image), input_data_format)
    else:
        hint = " Pass the result of its .read() for an open file." if hasattr(image, "read") else ""
        raise ImageError(
            f"An image of type {type(image).__name__} cannot be read. Expected a path, the bytes of an image file, "
            f"a Pillow image, or an array.{hint}"
        )
    return _to_mode(upright, "L" if num_channels == 1 else "RGB")


def read_image_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of an image file. Other files are refused: reading a pipe may wait forever, a device may have no end.

    Raises ImageError if it is not a file, or too large for an image; OSError if it cannot be read.
    """
    if (reason := why_unreadable(path, _LARGEST_FILE)) is not None:
        raise ImageError(f"it {reason}")
    return Path(path).read_bytes()


@contextmanager
def raising_image_errors(name: str, file: str | os.PathLike[str] | BytesIO | None = None) -> Iterator[None]:
    """Turns the exceptions of Pillow's decoders into ImageError. Only for blocks that do nothing but decode a file.

    `file`, the path or the contents, names formats that Pillow can read only with another package. Raises ImageError,
    naming the file `name`, for every exception but MemoryError.
    """
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image that can be read: {_unreadable_format(file)}.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(_too_large(name)) from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ... for foreign bytes
        raise ImageError(f"{name} is not an image that can be read: {error}") from error


def open_image(file: str | os.PathLike[str] | BytesIO, name: str) -> Image.Image:
    """Opens a file in one of the formats that are read, and reads only its header.

    Raises ImageError, naming the file `name`, if decoding it would take much more time or memory than its pixels need;
    see `raising_image_errors` for files in other formats.
    """
    image = Image.open(file, formats=_formats())
    try:
        _check_size(image.width * image.height, f"{name}, {image.width} x {image.height} pixels,")
        if image.format in ("JPEG", "MPO"):
            _check_scans(image, name)
        elif isinstance(image, TiffImageFile):
            width, height = (image.tag_v2.get(tag, 0) for tag in _TIFF_TILE)
            _check_size(width * height, f"A tile of {name}")
    except BaseException:
        image.close()
        raise
    return image


def _check_size(pixels: int, name: str) -> None:
    """Raises ImageError for more pixels than Pillow's limit: up to twice as many it only warns."""
    if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
        raise ImageError(_too_large(name))


def _check_scans(image: Any, name: str) -> None:
    # Pillow has read the header of the first scan, and of an MPO it has gone back to the file's beginning.
    file, position, channels = image.fp, image.fp.tell(), image.layers
    whole_scan = _START_OF_SCAN + bytes([0, 6 + 2 * channels, channels])
    file.seek(max(position - len(whole_scan) - 2 * channels - 3, 0))
    if "progressive" in image.info or file.read(len(whole_scan)) != whole_scan:  # there may be other scans
        file.seek(0)
        data = file.read()
        if data.count(_START_OF_SCAN) > _MOST_SCANS and _has_many_scans(data):
            raise ImageError(f"{name} has more than {_MOST_SCANS} scans, and could take minutes to decode.")
    file.seek(position)


def _has_many_scans(data: bytes) -> bool:
    """Counts the scans of a JPEG up to its end. Thumbnails before and films after it may hold the marker too."""
    scans, position = 0, 2
    while scans <= _MOST_SCANS and (marker := _MARKER.search(data, position)) and marker[0] != b"\xff\xd9":
        scans += marker[0] == _START_OF_SCAN
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])
    return scans > _MOST_SCANS


def _open(file: str | os.PathLike[str] | BytesIO, name: str) -> Image.Image:
    with raising_image_errors(name, file):
        if not isinstance(file, BytesIO) and not Path(file).exists():
            if is_local(os.fspath(file)):
                raise ImageError(f"There is no image file {name}.")
            name = re.sub(r"^'(\w+):/+", r"'\1://", name)  # a Path keeps one slash
            raise ImageError(
                f"There is no image file {name}. URLs are not downloaded. Expected a file, or in Python its bytes."
            )
        # Pillow reads all of a WebP or AVIF. A TIFF has up to 64 bits a pixel.
        if not isinstance(file, BytesIO) and (reason := why_unreadable(file, 4 * _LARGEST_FILE)) is not None:
            raise ImageError(f"{name} {reason}.")
        with open_image(file, name) as image:
            return decode(image, name)


def _unreadable_format(file: str | os.PathLike[str] | BytesIO | None) -> str:
    """The reason why Pillow does not identify a file."""
    if file is None or isinstance(file, BytesIO):
        start = b"" if file is None else file.getvalue()[:12]
    else:
        with Path(file).open("rb") as opened:
            start = opened.read(12)
    if start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS:
        return "it is a HEIC photo. Install pillow-heif (the extra heif), or convert it to JPEG"
    if start[4:8] == b"ftyp" and start[8:12] in (b"avif", b"avis"):
        return "it is an AVIF image. Install a Pillow that is built with AVIF (11.3 and newer), or convert it to JPEG"
    return f"it is damaged, or its format is not {_READ}. Convert it to PNG"


def decode(image: Image.Image, name: str) -> Image.Image:
    """Decodes all pixels, and rotates them upright."""
    _check_size(image.width * image.height, f"{name}, {image.width} x {image.height} pixels,")
    if image.format in _DRAWINGS:
        raise ImageError(f"{name} is a drawing ({image.format}). Expected pixels; convert it to PNG first.")
    if image.width == 0 or image.height == 0:
        raise ImageError(f"{name} is {image.width} x {image.height} pixels. Expected at least one pixel.")
    if image.mode == "I" and image.format == "PPM":  # 16 bits: Pillow scales all samples of more than 8 bits to 16
        image = Image.fromarray(np.asarray(image).astype(np.uint16))
    try:
        image.load()
        return turn_upright(image)
    except MemoryError:
        raise
    except Exception as error:  # see `raising_image_errors`
        raise ImageError(f"{name} is truncated or damaged: {error}") from error


def as_numpy(array: Any) -> Shaped[np.ndarray, "..."]:
    """An array of any library on the CPU. Raises ImageError if it cannot be converted."""
    try:
        return np.asarray(array)
    except MemoryError:
        raise
    except Exception as error:  # PyTorch raises RuntimeError for a tensor that requires gradients
        raise ImageError(f"A {type(array).__name__} cannot be converted to a NumPy array: {error}") from error


def _too_large(name: str) -> str:
    return (
        f"{name} has more than {Image.MAX_IMAGE_PIXELS} pixels, and could be a decompression bomb. "
        "If you trust it, raise PIL.Image.MAX_IMAGE_PIXELS."
    )


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ImageError(
            f"An image of mode {image.mode!r} (32-bit greyscale) has no known range. Expected 8 or 16 bits per sample; "
            'scale it and convert it to mode "L".'
        )
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # converting to RGB directly warns
    if image.mode == mode:
        return image
    try:
        return image.convert(mode)
    except ValueError as error:
        raise ImageError(
            f"An image of mode {image.mode!r} cannot be converted to {mode}: {error}. Convert it to RGB first."
        ) from error


def _from_array(array: Shaped[np.ndarray, "..."], data_format: str | None) -> Image.Image:
    pixels = _to_uint8(channels_last(array, data_format))
    if 0 in pixels.shape:
        raise ImageError(f"An array of shape {array.shape} has no pixels. Expected at least one.")
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def channels_last(array: Shaped[np.ndarray, "..."], data_format: str | None) -> Shaped[np.ndarray, "h w c"]:
    """One image with its channels last; `data_format` is inferred from the shape if it is None.

    Raises ImageError if the array is not an image, or its channels could be first or last.
    """
    expected = "Expected one image as [h, w], [h, w, c] or [c, h, w] with 1, 3 or 4 channels"
    if data_format not in (None, *DATA_FORMATS):
        raise ImageError(f"input_data_format={data_format!r}. Expected None, {' or '.join(map(repr, DATA_FORMATS))}.")
    if array.ndim == 2:
        return array[..., None]
    if array.ndim != 3:
        raise ImageError(f"An array of shape {array.shape} is not an image. {expected}.")
    could_be = {"channels_last": array.shape[-1] in _CHANNELS, "channels_first": array.shape[0] in _CHANNELS}
    if data_format is None:
        if all(could_be.values()):
            raise ImageError(
                f"An array of shape {array.shape} could have its channels first or last. "
                'Pass input_data_format="channels_last" or "channels_first", or a Pillow image.'
            )
        data_format = next((name for name, possible in could_be.items() if possible), "channels_last")
    if not could_be[data_format]:
        raise ImageError(f"An array of shape {array.shape} is not an image with {data_format}. {expected}.")
    return array if data_format == "channels_last" else np.moveaxis(array, 0, -1)


def _to_uint8(array: Shaped[np.ndarray, "h w c"]) -> Shaped[np.ndarray, "h w c"]:
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.uint16:
        return (array >> 8).astype(np.uint8)
    if array.dtype == ml_dtypes.bfloat16:  # np.issubdtype does not count it as floating
        array = array.astype(np.float32)
    if np.issubdtype(array.dtype, np.floating):
        low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
        if not (np.rint(low * 255) >= 0 and np.rint(high * 255) <= 255):  # also true for NaN
            raise ImageError(
                f"A floating-point image has values from {low:.9g} to {high:.9g}. Expected 0 to 1; for 0 to 255 pass "
                "uint8. Pass pixels that are already normalised to the model directly."
            )
        return np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    raise ImageError(
        f"An image array of type {array.dtype} has no known range. Expected uint8, uint16, or floats from 0 to 1."
    )

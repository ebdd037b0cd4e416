"""Turns photos upright by the orientation in their EXIF, whatever else the EXIF holds.

Pillow reads all of an EXIF to find one number, and stops at the first entry that is damaged.
`PIL.ImageOps.exif_transpose` also writes the EXIF back, which fails for values such as the rational -1/0. Many cameras
and editors leave such entries, and the pixels do not depend on them.

Source: CIPA DC-008 (Exif 3.0), sections 4.5 and 4.6.
"""

from typing import Literal

from PIL import ExifTags, Image

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Bytes of the types of number that an orientation may have: BYTE, SHORT, LONG.
_SIZES = {1: 1, 3: 2, 4: 4}
_ENTRY = 12  # bytes: tag, type, count, value
# Where Pillow keeps an orientation.
_INFO = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


def is_upright(image: Image.Image) -> bool:
    """True if the EXIF orientation needs no rotation."""
    return _orientation(image) not in _TURNS


def turn_upright(image: Image.Image) -> Image.Image:
    """The image without the EXIF orientation, rotated or mirrored by it; `image` itself if it is upright."""
    orientation = _orientation(image)
    if orientation not in _TURNS:
        return image
    turned = image.transpose(_TURNS[orientation])
    turned.info = {name: value for name, value in image.info.items() if name not in _INFO}
    return turned


def _orientation(image: Image.Image) -> int:
    """The orientation, 1 to 8; 1 if it is missing or unreadable."""
    exif = image.info.get("exif")
    found = _orientation_in(exif) if isinstance(exif, bytes) else None
    if found is None:  # in a TIFF file's own entries, a text chunk or XMP
        try:
            found = image.getexif().get(ExifTags.Base.Orientation, 1)
        except MemoryError:
            raise
        except Exception:  # SyntaxError, struct.error, ... for damaged entries
            return 1
    return found if isinstance(found, int) else 1


def _orientation_in(exif: bytes) -> int | None:
    """The orientation in the first directory of an EXIF; None if it has none. Reads no other entry's value."""
    tiff = exif.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")
    orders: dict[bytes, Literal["little", "big"]] = {b"II": "little", b"MM": "big"}
    order = orders.get(tiff[:2])
    if order is None:
        return None

    def number(start: int, size: int) -> int:
        return int.from_bytes(tiff[start : start + size], order)

    directory = number(4, 4)
    first = directory + 2
    for entry in range(first, min(first + _ENTRY * number(directory, 2), len(tiff)), _ENTRY):
        size = _SIZES.get(number(entry + 2, 2))
        if number(entry, 2) == ExifTags.Base.Orientation and size is not None:
            return number(entry + 8, size)
    return None

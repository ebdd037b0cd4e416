"""What the header of a JPEG says (ITU-T T.81, annex B), as far as cutting and decoding its parts needs it.

Pillow reads headers, too, but neither where the bits start nor the restart interval, and it takes three times as long.
"""

import struct
from typing import NamedTuple, Self

_SOI, _SOS, _DRI = 0xD8, 0xDA, 0xDD
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1), 0xC2
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # those three are tables
_METADATA = 0xE1  # EXIF and XMP
# The frame, tables of Huffman codes and quantization, the interval, the scan; JFIF and Adobe say what the colours are.
_KEPT = frozenset({*_SEQUENTIAL, 0xC4, 0xDB, _DRI, _SOS, 0xE0, 0xEE})


class JpegHeader(NamedTuple):
    """What comes before the bits of a JPEG of one or three colours with 8 bits a sample."""

    tables: bytes
    """The start of a JPEG without what only describes the image."""
    size_at: int
    """Where in `tables` height and width are."""
    width: int
    height: int
    num_channels: int
    block: tuple[int, int]
    """Width and height of an MCU in pixels: the least that is coded together."""
    interval: int
    """MCUs from one restart to the next; 0 if there is none."""
    sequential: bool
    """Whether everything is in one scan, coded in order."""
    metadata: bool
    """Whether there is EXIF or XMP, which may say that the image is to be turned."""
    bits_at: int
    """Where in the file the bits start."""

    @classmethod
    def read(cls, data: bytes) -> Self | None:
        """None for other files, and for a header that is damaged or unusual."""
        kept = [data[:2]]
        size_at = interval = frame = 0
        metadata = False
        if kept[0] != bytes((0xFF, _SOI)):
            return None
        at, marker = 2, _SOI
        try:
            while marker != _SOS:
                start, marker, length = struct.unpack_from(">BBH", data, at)
                if start != 0xFF or length < 2:
                    return None
                if marker in _FRAMES:
                    frame, size_at = marker, sum(map(len, kept)) + 5
                    precision, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
                    factors = [data[at + 11 + 3 * number] for number in range(channels)]
                elif marker == _DRI:
                    (interval,) = struct.unpack_from(">H", data, at + 4)
                metadata |= marker == _METADATA
                if marker in _KEPT:
                    kept.append(data[at : at + 2 + length])
                at += 2 + length
            in_first_scan = kept[-1][4]
        except (struct.error, IndexError):
            return None
        if (
            frame not in (*_SEQUENTIAL, _PROGRESSIVE)
            or precision != 8
            or channels not in (1, 3)
            or 0 in (width, height)
        ):
            return None
        sequential = frame in _SEQUENTIAL and in_first_scan == channels
        # One component by itself is coded block by block, whatever its sampling factors are.
        block = (8, 8) if channels == 1 else tuple(8 * max(f) for f in zip(*(divmod(f, 16) for f in factors)))
        return cls(b"".join(kept), size_at, width, height, channels, block, interval, sequential, metadata, at)

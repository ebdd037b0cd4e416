"""Cutting a part out of a JPEG without decoding the rest of it, where its restart markers allow it.

The bits of a JPEG can only be read from the first to the last: codes differ in length, and every block's mean is
stored as a difference to the block before it. Restart markers (ITU-T T.81, B.2.1 and E.1.4) divide them into intervals
that start afresh. Where an interval is a row of blocks, or an equal part of one, the intervals that a part of the image
lies in make a smaller JPEG: the same tables, another width and height, the markers numbered anew. Any decoder reads it,
and it gives the very pixels of the whole image, if a margin is left for the decoder's interpolation of colours between
blocks.

Some cameras write such files. `python -m train prepare --restart-markers` makes them of others without changing a pixel
(`add_restart_markers`). Reading the bits is most of the work of decoding: with an eighth of a row for an interval, the
crops of ImageNet's training are decoded in two thirds of the time.
"""

import math
import shutil
import struct
import subprocess
from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple, Self

import numpy as np
from PIL import Image

from train.data.crops import Box

_SOI, _EOI, _SOS, _DRI = 0xD8, 0xD9, 0xDA, 0xDD
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1), 0xC2
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # those three are tables
_METADATA = 0xE1  # EXIF and XMP
# The frame, tables of Huffman codes and quantization, the interval, the scan; JFIF and Adobe say what the colours are.
_KEPT = frozenset({*_SEQUENTIAL, 0xC4, 0xDB, _DRI, _SOS, 0xE0, 0xEE})
_MARGIN = 4  # pixels: what interpolating colours between blocks looks at, and the pixel that it makes of them
_PARTS_OF_A_ROW = 8


class _Header(NamedTuple):
    """What comes before the bits, as far as it matters here."""

    tables: bytes
    """The start of a JPEG without what only describes the image."""
    size_at: int
    """Where in `tables` height and width are."""
    width: int
    height: int
    components: int
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


class Cut(NamedTuple):
    """A part of an image as a JPEG of its own."""

    data: bytes
    left: int
    """Where the part is in the whole image, in pixels."""
    top: int
    width: int
    height: int


@dataclass(frozen=True)
class RestartJpeg:
    """A JPEG whose restart intervals are rows of blocks, or equal parts of rows."""

    data: bytes
    header: _Header
    starts: np.ndarray
    """Where in the file each interval starts: int64 [n]."""
    ends: np.ndarray
    """Where it ends."""

    @classmethod
    def read(cls, data: bytes) -> Self | None:
        """What can be cut, or None: for other formats, and for every JPEG that is in any way unusual."""
        header = _read_header(data)
        if header is None or not header.sequential or not header.interval or _across(header) % header.interval:
            return None
        bits = np.frombuffer(data, np.uint8, offset=header.bits_at)
        found = np.flatnonzero(bits[:-1] == 0xFF)
        codes = bits[found + 1]
        markers = codes != 0  # an 0xFF among the bits is followed by 0
        found, codes = found[markers] + header.bits_at, codes[markers]
        count = -(-header.height // header.block[1]) * (_across(header) // header.interval)
        if len(codes) != count or codes[-1] != _EOI or (codes[:-1] != 0xD0 + np.arange(count - 1) % 8).any():
            return None
        return cls(data, header, np.concatenate(([header.bits_at], found[:-1] + 2)), found)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.header.width, self.header.height

    @property
    def mode(self) -> str:
        """The image's mode in Pillow."""
        return "L" if self.header.components == 1 else "RGB"

    def cut(self, box: Box, margin: int = 0) -> Cut:
        """The JPEG of a part of the image that holds the box.

        Args:
            box: wanted with the pixels that decoding the whole image gives.
            margin: the same is wanted so many pixels beyond the box, where the image goes so far.
        """
        header = self.header
        step_x, step_y = header.interval * header.block[0], header.block[1]
        across, down = _across(header) // header.interval, -(-header.height // step_y)
        margin += _MARGIN
        first_x, last_x = max(0, box.left - margin) // step_x, min(across, -(-(box.right + margin) // step_x))
        first_y, last_y = max(0, box.top - margin) // step_y, min(down, -(-(box.bottom + margin) // step_y))
        left, top = first_x * step_x, first_y * step_y
        tables = bytearray(header.tables)
        width, height = min(header.width, last_x * step_x) - left, min(header.height, last_y * step_y) - top
        struct.pack_into(">HH", tables, header.size_at, height, width)
        parts = [bytes(tables)]
        starts, ends = self.starts.reshape(down, across), self.ends.reshape(down, across)
        places = (slice(first_y, last_y), slice(first_x, last_x))
        for number, (start, end) in enumerate(zip(starts[places].ravel().tolist(), ends[places].ravel().tolist())):
            parts += (self.data[start:end], _RESTARTS[number % 8])
        parts[-1] = b"\xff\xd9"
        return Cut(b"".join(parts), left, top, width, height)


_RESTARTS = [bytes((0xFF, 0xD0 + number)) for number in range(8)]


def add_restart_markers(data: bytes) -> bytes:
    """The same image with restart markers, or the bytes as they are if there is no need or no way.

    libjpeg-turbo's `jpegtran` rewrites the bits and leaves every coefficient as it is; progressive files become
    sequential ones. Whether all pixels are the same is looked at here once more.

    Raises:
        OSError: if there is no jpegtran.
    """
    header = _read_header(data)
    if header is None or RestartJpeg.read(data) is not None:
        return data
    across = _across(header)
    divisors = [number for number in range(1, across + 1) if across % number == 0]
    interval = min(divisors, key=lambda number: abs(math.log(number * _PARTS_OF_A_ROW / across)))
    command = ["jpegtran", "-copy", "all", "-optimize", "-restart", f"{interval}B"]
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    # It warns of damage by its exit code.
    return done.stdout if done.returncode == 0 and _same_pixels(data, done.stdout) else data


def jpegtran_is_installed() -> bool:
    """Whether `add_restart_markers` can work."""
    return shutil.which("jpegtran") is not None


def _same_pixels(data: bytes, other: bytes) -> bool:
    try:
        with Image.open(BytesIO(data)) as image, Image.open(BytesIO(other)) as rewritten:
            return image.mode == rewritten.mode and image.tobytes() == rewritten.tobytes()
    except Exception:  # damaged; Pillow's decoders raise many things
        return False


def _across(header: _Header) -> int:
    return -(-header.width // header.block[0])


def _read_header(data: bytes) -> _Header | None:
    """None for what is no JPEG of one or three components with 8 bits a sample."""
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
                precision, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
                factors = [data[at + 11 + 3 * number] for number in range(components)]
            elif marker == _DRI:
                (interval,) = struct.unpack_from(">H", data, at + 4)
            metadata |= marker == _METADATA
            if marker in _KEPT:
                kept.append(data[at : at + 2 + length])
            at += 2 + length
        in_first_scan = kept[-1][4]
    except (struct.error, IndexError):
        return None
    if frame not in (*_SEQUENTIAL, _PROGRESSIVE) or precision != 8 or components not in (1, 3) or 0 in (width, height):
        return None
    sequential = frame in _SEQUENTIAL and in_first_scan == components
    # A component by itself is coded block by block, whatever its sampling factors are.
    across, down = (8 if components == 1 else 8 * max(factor) for factor in zip(*(divmod(f, 16) for f in factors)))
    tables = b"".join(kept)
    return _Header(tables, size_at, width, height, components, (across, down), interval, sequential, metadata, at)

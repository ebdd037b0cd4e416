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
from train.data.jpeg_header import JpegHeader

_EOI = 0xD9
_MARGIN = 4  # pixels: what interpolating colours between blocks looks at, and the pixel that it makes of them
_PARTS_OF_A_ROW = 8


class Cut(NamedTuple):
    """A part of an image as a JPEG of its own."""

    data: bytes
    box: Box
    """Where in it the wanted pixels are."""


@dataclass(frozen=True)
class RestartJpeg:
    """A JPEG whose restart intervals are rows of blocks, or equal parts of rows."""

    data: bytes
    header: JpegHeader
    starts: np.ndarray
    """Where in the file each interval starts: int64 [n]."""
    ends: np.ndarray
    """Where it ends."""

    @classmethod
    def read(cls, data: bytes, header: JpegHeader) -> Self | None:
        """What can be cut, or None if the header does not say so, or something is missing."""
        if not header.sequential or not header.interval or _across(header) % header.interval:
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

    def cut(self, box: Box) -> Cut:
        """The smallest JPEG that has the pixels inside the box as decoding the whole image gives them."""
        header = self.header
        step_x, step_y = header.interval * header.block[0], header.block[1]
        across, down = _across(header) // header.interval, -(-header.height // step_y)
        first_x, last_x = max(0, box.left - _MARGIN) // step_x, min(across, -(-(box.right + _MARGIN) // step_x))
        first_y, last_y = max(0, box.top - _MARGIN) // step_y, min(down, -(-(box.bottom + _MARGIN) // step_y))
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
        return Cut(b"".join(parts), Box(box.left - left, box.top - top, box.right - left, box.bottom - top))


_RESTARTS = [bytes((0xFF, 0xD0 + number)) for number in range(8)]


def add_restart_markers(data: bytes) -> bytes:
    """The same image with restart markers, or the bytes as they are if there is no need or no way.

    libjpeg-turbo's `jpegtran` rewrites the bits and leaves every coefficient as it is; progressive files become
    sequential ones. Whether all pixels are the same is looked at here once more.

    Raises:
        OSError: if there is no jpegtran.
    """
    header = JpegHeader.read(data)
    if header is None or RestartJpeg.read(data, header) is not None:
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


def _across(header: JpegHeader) -> int:
    return -(-header.width // header.block[0])

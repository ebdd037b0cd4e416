"""Decoding one region of a JPEG and little else, by nvImageCodec where it is installed.

The bits of a JPEG have to be read from the first to the last. What follows (inverse DCT, interpolation of colours,
their conversion to RGB) only the wanted region needs, and libjpeg-turbo can leave the rest out. Pillow has no way to
ask for that. nvImageCodec has: its decoder for CPUs is libjpeg-turbo, and needs no GPU, driver or CUDA. The pixels are
those that Pillow decodes, bit for bit.
"""

import functools
import importlib.util
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import ModuleType

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from train.data.augment.crops import Box

_NAME = "nvidia.nvimgcodec"
_NARROWEST = 16
"""In pixels. At the left edge of the image libjpeg-turbo interpolates the colours of a single column otherwise."""

_IMPORTING = threading.Lock()  # a cached function alone lets two threads in at once
_LOG = logging.getLogger(__name__)


@functools.cache
def decodes_regions() -> bool:
    """Whether nvImageCodec is installed and works."""
    file = BytesIO()
    Image.new("RGB", (40, 40)).save(file, "JPEG")
    try:
        return _threads.decoder.decode(file.getvalue(), Box(1, 2, 30, 33), 3) is not None
    except ImportError:
        return False
    except Exception as error:  # before its version 1 its interface may change
        _LOG.warning("nvImageCodec is installed but does not work. Pillow decodes, which takes longer: %r", error)
        return False


def decode_region(data: bytes, box: Box, num_channels: int) -> UInt8[np.ndarray, "h w c"] | None:
    """The pixels inside the box. None where nvImageCodec is not installed, for files that it refuses, and narrow boxes.

    Args:
        data: a JPEG whose colours are greyscale, YCbCr or RGB.
        box: a part of the image as it is stored, whatever EXIF says of turning it.
        num_channels: 3 for RGB, 1 for greyscale.
    """
    if box.width < _NARROWEST or not decodes_regions():
        return None
    return _threads.decoder.decode(data, box, num_channels)


class _Decoder:
    def __init__(self) -> None:
        with _IMPORTING:
            codec = _import()
        self._codec = codec
        self._decoder = codec.Decoder(
            device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            backends=[codec.Backend(codec.BackendKind.CPU_ONLY)],
        )
        colours = {1: codec.ColorSpec.GRAY, 3: codec.ColorSpec.SRGB}
        self._parameters = {
            channels: codec.DecodeParams(apply_exif_orientation=False, color_spec=colour)
            for channels, colour in colours.items()
        }

    def decode(self, data: bytes, box: Box, num_channels: int) -> UInt8[np.ndarray, "h w c"] | None:
        region = self._codec.Region(start=(box.top, box.left), end=(box.bottom, box.right))
        stream = self._codec.CodeStream(data).get_sub_code_stream(region=region)
        image = self._decoder.decode(stream, params=self._parameters[num_channels])
        return None if image is None else np.asarray(image)


class _Threads(threading.local):
    """A decoder for every thread: it lets go of the interpreter while it works."""

    @functools.cached_property
    def decoder(self) -> _Decoder:
        return _Decoder()


_threads = _Threads()


@functools.cache
def _import() -> ModuleType:
    """nvImageCodec with its plugin for libjpeg-turbo and no other.

    It would load those for other formats and for GPUs as well, which complain on stderr of libraries that they do not
    find, and one that decodes damaged JPEGs as far as it can and hides the damage.

    Raises:
        ImportError: if it is not installed.
    """
    package = importlib.util.find_spec(_NAME)
    if package is None or package.origin is None:
        raise ImportError(f"{_NAME} is not installed")
    if _NAME in sys.modules:
        raise RuntimeError(f"something else has imported {_NAME} before, with all of its plugins")
    with tempfile.TemporaryDirectory() as folder:
        for plugin in (Path(package.origin).parent / "extensions").glob("*jpeg_turbo*"):
            (Path(folder) / plugin.name).symlink_to(plugin)
        with _environment(NVIMGCODEC_EXTENSIONS_PATH=folder, PYNVIMGCODEC_VERBOSITY="0"):
            return importlib.import_module(_NAME)


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

"""Decodes a region of a JPEG and little else with nvImageCodec, if it is installed.

The bits of a JPEG must be read from the start, but libjpeg-turbo can skip the inverse DCT, colour interpolation and
colour conversion outside a region. Pillow cannot ask for that; nvImageCodec can: its CPU decoder is libjpeg-turbo and
needs no GPU, driver or CUDA. The pixels are bit-equal to Pillow's.

nvImageCodec always loads all plugins in one folder: those for GPUs complain on stderr about missing libraries, and
one for other formats decodes damaged JPEGs without an error. No option of the decoder prevents that, so `_import_codec`
gives it a folder that links to the plugin for libjpeg-turbo.
"""

import functools
import importlib
import importlib.util
import logging
import os
import tempfile
import threading
from io import BytesIO
from pathlib import Path
from types import ModuleType

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from train.data.augment.crops import Box

_NAME = "nvidia.nvimgcodec"
_MIN_WIDTH = 16
"""In pixels. libjpeg-turbo interpolates the colours of a single column at the image's left edge differently."""

_LOG = logging.getLogger(__name__)


@functools.cache
def decodes_regions() -> bool:
    """True if nvImageCodec is installed and works."""
    file = BytesIO()
    Image.new("RGB", (40, 40)).save(file, "JPEG")
    try:
        return _threads.decoder.decode(file.getvalue(), Box(1, 2, 30, 33), 3) is not None
    except ImportError:
        return False
    except Exception as error:  # its interface may change before version 1
        _LOG.warning("nvImageCodec is installed but does not work; decoding with Pillow, which is slower: %r", error)
        return False


def decode_region(data: bytes, box: Box, num_channels: int) -> UInt8[np.ndarray, "h w c"] | None:
    """The pixels inside the box. None without nvImageCodec, for files that it cannot decode, and for narrow boxes.

    The box is a part of the stored image, whose EXIF orientation is ignored.
    """
    if box.width < _MIN_WIDTH or not decodes_regions():
        return None
    return _threads.decoder.decode(data, box, num_channels)


class _Decoder:
    def __init__(self) -> None:
        self._codec = codec = _import_codec()
        self._decoder = codec.Decoder(
            device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            backends=[codec.Backend(codec.BackendKind.CPU_ONLY)],
        )
        self._parameters = {
            channels: codec.DecodeParams(apply_exif_orientation=False, color_spec=colour)
            for channels, colour in ((1, codec.ColorSpec.GRAY), (3, codec.ColorSpec.SRGB))
        }

    def decode(self, data: bytes, box: Box, num_channels: int) -> UInt8[np.ndarray, "h w c"] | None:
        region = self._codec.Region(start=(box.top, box.left), end=(box.bottom, box.right))
        stream = self._codec.CodeStream(data).get_sub_code_stream(region=region)
        image = self._decoder.decode(stream, params=self._parameters[num_channels])
        return None if image is None else np.asarray(image)


class _Threads(threading.local):
    """A decoder for every thread, because it releases the GIL while it works."""

    @functools.cached_property
    def decoder(self) -> _Decoder:
        return _Decoder()


_threads = _Threads()


@functools.cache
def _import_codec() -> ModuleType:
    """Imports nvImageCodec with its plugin for libjpeg-turbo alone. Raises ImportError if it is not installed."""
    package = importlib.util.find_spec(_NAME)
    if package is None or package.origin is None:
        raise ImportError(f"{_NAME} is not installed")
    with tempfile.TemporaryDirectory() as folder:
        for plugin in (Path(package.origin).parent / "extensions").glob("*jpeg_turbo*"):
            (Path(folder) / plugin.name).symlink_to(plugin)
        os.environ |= {"NVIMGCODEC_EXTENSIONS_PATH": folder, "PYNVIMGCODEC_VERBOSITY": "0"}
        try:
            return importlib.import_module(_NAME)
        finally:
            for name in ("NVIMGCODEC_EXTENSIONS_PATH", "PYNVIMGCODEC_VERBOSITY"):
                os.environ.pop(name, None)

"""Decoding one region of a JPEG: the same pixels as Pillow's, and Pillow itself if nvImageCodec fails."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from jpegs import KINDS, boxes, encoded, opened, photograph
from poolformer_jax.images import ImageError
from train.data.augment import jpeg_region
from train.data.augment.crops import Box
from train.data.augment.decode import decode_crop
from train.data.augment.jpeg_region import decode_region, decodes_regions
from train.data.augment.resizing import to_pixels

BOX = Box(31, 22, 267, 245)
BICUBIC = Image.Resampling.BICUBIC
needs_codec = pytest.mark.skipif(not decodes_regions(), reason="nvImageCodec is not installed")


def decoded(data, box=BOX):
    return decode_crop(data, lambda width, height: box, 224, BICUBIC)


@needs_codec
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}, {"quality": 30}])
@pytest.mark.parametrize(("mode", "subsampling"), KINDS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_region_has_the_pixels_of_the_whole(options, mode, subsampling, data):
    size = (203, 141)  # not a multiple of any block size
    whole = encoded(photograph(mode, size), subsampling=subsampling, **options)
    box = data.draw(boxes(*size))
    pixels = decode_region(whole, box, len(mode))
    if pixels is None:
        assert box.width < 16
    else:
        np.testing.assert_array_equal(pixels, to_pixels(opened(whole).crop(box)))


@needs_codec
def test_training_decodes_regions(monkeypatch):
    data, asked = encoded(photograph()), []
    monkeypatch.setattr(
        "train.data.augment.decode.decode_region", lambda *args: asked.append(args) or decode_region(*args)
    )
    decoded(data)
    assert asked == [(data, BOX, 3)]


@needs_codec
def test_data_below_the_region_may_be_missing():
    """The decoder needs the marker at the end of the file."""
    data = encoded(photograph())
    shorter = data[: len(data) * 3 // 4]
    np.testing.assert_array_equal(decoded(shorter + bytes((0xFF, 0xD9))), decoded(data))


@needs_codec
@pytest.mark.parametrize("share", [0.3, 0.6, 0.999])
def test_a_file_that_ends_inside_the_region_is_refused(share):
    data = encoded(photograph())
    with pytest.raises(ImageError, match="truncated"):
        decoded(data[: int(share * len(data))], Box(0, 0, 600, 400))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_damaged_files_that_pillow_reads_are_read(data):
    damaged = bytearray(encoded(photograph("RGB", (203, 141))))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(2, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        opened(bytes(damaged))
    except Exception:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        with suppress(ImageError):
            decoded(bytes(damaged), Box(10, 10, 50, 50))
    else:
        assert decoded(bytes(damaged), Box(10, 10, 50, 50)).shape == (224, 224, 3)


@needs_codec
def test_many_threads_decode_at_once():
    data = encoded(photograph())
    wanted = [Box(number, number, number + 100, number + 90) for number in range(100)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda box: decode_region(data, box, 3), wanted))
    for box, pixels in zip(wanted, found):
        np.testing.assert_array_equal(pixels, to_pixels(opened(data).crop(box)))


@needs_codec
def test_missing_libraries_for_other_formats_cause_no_output():
    program = "from train.data.augment.jpeg_region import decodes_regions; assert decodes_regions()"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout + run.stderr == ""


@pytest.fixture
def codec_not_loaded(monkeypatch):
    """decodes_regions() looks for nvImageCodec again, in this test and after it."""
    monkeypatch.setattr(jpeg_region, "_threads", jpeg_region._Threads())
    decodes_regions.cache_clear()
    yield monkeypatch
    decodes_regions.cache_clear()


def raise_import_error():
    raise ImportError("nvidia.nvimgcodec is not installed")


@pytest.mark.parametrize(("import_codec", "warns"), [(raise_import_error, False), (lambda: os, True)])
def test_pillow_decodes_if_the_codec_is_missing_or_has_another_interface(codec_not_loaded, caplog, import_codec, warns):
    data = encoded(photograph())
    codec_not_loaded.setattr(jpeg_region, "_import_codec", import_codec)
    assert decode_region(data, BOX, 3) is None
    np.testing.assert_array_equal(decoded(data), to_pixels(opened(data).crop(BOX).resize((224, 224), BICUBIC)))
    assert ("nvImageCodec is installed but does not work" in caplog.text) == warns

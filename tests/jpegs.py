"""Photographs and JPEG files for the tests of decoding and resizing."""

import io
from pathlib import Path

import pytest
from hypothesis import strategies as st
from PIL import Image

from train.data import choose_resizer
from train.data.augment.crops import Box

IMAGES = Path(__file__).parent / "images"
KINDS = [("RGB", 0), ("RGB", 1), ("RGB", 2), ("L", 0)]
"""Mode and Pillow's subsampling: 4:4:4, 4:2:2, 4:2:0, grey."""

needs_simd = pytest.mark.skipif(choose_resizer("auto") != "simd", reason="cykooz-resizer is not installed")
RESIZERS = ("pillow", pytest.param("simd", marks=needs_simd))


def photograph(mode="RGB", size=None):
    with Image.open(IMAGES / "coffee.jpg") as image:
        picture = image.convert(mode)
    return picture if size is None else picture.resize(size, Image.Resampling.BICUBIC)


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **{"quality": 90, **options})
    return file.getvalue()


def opened(data):
    with Image.open(io.BytesIO(data)) as image:
        image.load()
    return image


@st.composite
def boxes(draw, width, height):
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return Box(left, top, draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height)))

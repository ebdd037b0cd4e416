"""Random crops, shifts and rotations.

The random-resized crop is that of torchvision and timm (from Inception, arXiv 1409.4842): an area and an aspect ratio
are drawn up to ten times until they fit, else the crop is central. `resizing` resizes it to the network's input.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

_ATTEMPTS = 10


class Box(NamedTuple):
    """A part of an image, in pixels from its top left corner."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        """In pixels."""
        return self.right - self.left

    @property
    def height(self) -> int:
        """In pixels."""
        return self.bottom - self.top


def random_resized_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """A random crop of an image of `width` x `height` pixels.

    `scale` bounds its area as a share of the image's, drawn uniformly; `ratio` bounds width over height, drawn
    uniformly in the logarithm.
    """
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(_ATTEMPTS):
        area = rng.uniform(*scale) * width * height
        aspect = math.exp(rng.uniform(*log_ratio))
        box_width = round(math.sqrt(area * aspect))
        box_height = round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(rng.integers(0, width - box_width, endpoint=True))
            top = int(rng.integers(0, height - box_height, endpoint=True))
            return Box(left, top, left + box_width, top + box_height)
    return _largest_middle(width, height, ratio)


def _largest_middle(width: int, height: int, ratio: tuple[float, float]) -> Box:
    """The largest central crop with an allowed aspect ratio."""
    box_width = max(1, min(width, round(height * ratio[1])))
    box_height = max(1, min(height, round(width / ratio[0])))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return Box(left, top, left + box_width, top + box_height)


def shift_and_rotate(
    image: Image.Image, max_shift: float, max_rotation: float, rng: np.random.Generator
) -> Image.Image:
    """The image shifted, and rotated about its centre, by random amounts; pixels from outside are black.

    `max_shift` is a share of each edge, `max_rotation` an angle in degrees.
    """
    if max_shift == 0 and max_rotation == 0:
        return image
    angle = float(rng.uniform(-max_rotation, max_rotation))
    shift = rng.uniform(-max_shift, max_shift, size=2) * image.size
    translate = float(shift[0]), float(shift[1])  # Pillow accepts fractions, although annotated as int
    return image.rotate(angle, resample=Image.Resampling.BILINEAR, translate=translate)  # type: ignore[arg-type]

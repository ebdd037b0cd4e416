"""Shared by the tests of images: photographs, encoded images, and unprocessed pixels."""

import io
from pathlib import Path

import numpy as np

from poolformer_jax.images import PoolFormerImageProcessor, read_image

IMAGES = Path(__file__).parent / "images"
# Changes no pixels, so that tests can compare colours.
RAW = PoolFormerImageProcessor(do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)


def raw(image, num_channels=3, input_data_format=None):
    """The pixels of an image as it is read, in 8 bits."""
    return np.asarray(read_image(image, num_channels, input_data_format))


def encode(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()

"""Shared by the tests of images: photographs, encoded images, and unprocessed pixels."""

import io
from pathlib import Path

from poolformer_jax.images import PoolFormerImageProcessor

IMAGES = Path(__file__).parent / "images"
# Changes no pixels, so that tests can compare colours.
RAW = PoolFormerImageProcessor(do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)


def raw(image, **options):
    return RAW.preprocess(image, **options)["pixel_values"][0]


def encode(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()

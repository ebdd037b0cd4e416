"""One picture or several: telling them apart, and the pictures in lists and arrays."""

import os
from collections.abc import Iterable, Iterator, Mapping

from PIL import Image

from poolformer_jax.images.reading import ImageLike


def is_one_image(images: ImageLike) -> bool:
    """True for one picture, False for an iterable of pictures or an array of them."""
    if isinstance(images, Image.Image | str | bytes | bytearray | memoryview | os.PathLike):
        return True
    if hasattr(images, "__array__"):
        return len(getattr(images, "shape", ())) != 4
    # Open files and mappings are iterable too, but not iterables of pictures. `read_image` refuses them.
    return not isinstance(images, Iterable) or isinstance(images, Mapping) or hasattr(images, "read")


def flatten_images(images: Iterable[ImageLike]) -> Iterator[ImageLike]:
    """The images of an iterable that may hold lists of images, and arrays of four axes."""
    for image in images:
        if isinstance(image, list | tuple) or (hasattr(image, "__array__") and not is_one_image(image)):
            yield from image
        else:
            yield image

"""Shared by the tests of the input pipeline: a folder of photographs, small digits, and batches of them."""

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from train.data import DIGITS, DataConfig, HostAugmentation, train_batches

SMALL = dataclasses.replace(DIGITS, batch_size=8, workers=0, image_size=16)


def write_photographs(root):
    """Writes forty JPEGs of two classes and several sizes, and returns the folder."""
    with Image.open(Path(__file__).parent / "images" / "coffee.jpg") as image:
        for number in range(40):
            part = image.crop((number, 2 * number, 300 + 5 * number, 350))
            path = root / f"class {number % 2}" / f"{number:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            part.save(path, quality=90)
    return root


def photographs(folder, **changes):
    config = DataConfig(
        source=f"folder:{folder}", image_size=32, batch_size=8, workers=0, held_out=0.2, augment=HostAugmentation()
    )
    return dataclasses.replace(config, **changes)


def take(config, source, count, **where):
    with train_batches(config, source, **where) as batches:
        return [{name: np.array(value) for name, value in next(batches).items()} for _ in range(count)]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others):
        assert batch.keys() == other.keys()
        for name, value in batch.items():
            np.testing.assert_array_equal(value, other[name], err_msg=name)

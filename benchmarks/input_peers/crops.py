"""The random crop of PyTorch's pipelines, for the programs beside this file."""

import math
import random


def crop_window(width: int, height: int) -> tuple[int, int, int, int]:
    """Top, left, height and width: area 0.08 to 1, aspect ratio 3/4 to 4/3."""
    for _ in range(10):
        area = random.uniform(0.08, 1.0) * width * height
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w <= width and h <= height:
            break
    else:
        w, h = min(width, height), min(width, height)
    return random.randint(0, height - h), random.randint(0, width - w), h, w

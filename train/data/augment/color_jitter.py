"""Colour jitter on Pillow images: brightness, contrast, saturation and hue changed at random, in random order.

Factors, their order and the Pillow calls are those of torchvision's ColorJitter, which timm uses
(`--color-jitter`): for the same factors the pixels are equal.
"""

import numpy as np
from PIL import Image, ImageEnhance

Strengths = tuple[float, float, float, float]
_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def jitter_colors(image: Image.Image, strengths: Strengths, rng: np.random.Generator) -> Image.Image:
    """The image with jittered colours.

    Args:
        image: mode "RGB" or "L".
        strengths: of brightness, contrast, saturation and hue. The factor of the first three is uniform from
            max(0, 1 - strength) to 1 + strength; that of hue from -strength to strength, in turns of the colour circle.
        rng: of the factors and their order.
    """
    order = rng.permutation(4)
    uniform = rng.random(4)  # all are drawn, needed or not, so that later draws do not depend on the strengths
    for kind in order:
        strength = strengths[kind]
        if strength > 0:
            low, high = (-strength, strength) if kind == 3 else (max(0.0, 1 - strength), 1 + strength)
            image = change_color(image, int(kind), low + float(uniform[kind]) * (high - low))
    return image


def change_color(image: Image.Image, kind: int, factor: float) -> Image.Image:
    """The image with its brightness (kind 0), contrast (1), saturation (2) or hue (3) changed; deterministic."""
    if kind < 3:
        return _ENHANCERS[kind](image).enhance(factor)
    if image.mode == "L":
        return image
    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue, np.uint8) + np.array(int(factor * 255) % 256, np.uint8)  # wraps around
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert(image.mode)

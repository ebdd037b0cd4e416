"""RandAugment on Pillow images: two random operations, each applied with probability 1/2, at a noisy magnitude.

Paper: "RandAugment: Practical automated data augmentation with a reduced search space", arXiv 1909.13719. Notation,
magnitudes, operations and Pillow calls are those of timm (timm/data/auto_augment.py), which trained the published
PoolFormers: for the same operations and magnitudes the pixels are equal.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from poolformer_jax.errors import InputError

_LARGEST = 10.0  # magnitudes are tenths of an operation's full strength
_FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
_NOTATION = re.compile(r"(?P<key>mstd|mmax|inc|m|n|p)(?P<value>\d+(\.\d*)?|inf)")


class Operation(NamedTuple):
    """One operation with all of its random choices."""

    name: str
    magnitude: float
    """0 to 10, or to `magnitude_max`."""
    negative: bool
    """The direction of an operation that has two."""
    resample: int
    """Pillow's filter for the operations that move pixels."""


Fill = int | tuple[int, ...]
_Apply = Callable[[Image.Image, Operation, Fill], Image.Image]


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """A policy: draws operations for an image and applies them."""

    magnitude: float = 10.0
    magnitude_std: float = 0.0
    """Standard deviation of the normal noise on the magnitude; infinite means uniform from 0 to the magnitude."""
    magnitude_max: float = _LARGEST
    operations: int = 2
    probability: float = 0.5
    increasing: bool = False
    """Use the variants that grow stronger with the magnitude."""
    fill: Fill = (128, 128, 128)
    """Colour of pixels from outside the image; one value for greyscale images."""
    resample: tuple[int, ...] = _FILTERS
    """Filters from which operations that move pixels choose."""

    @classmethod
    def from_notation(cls, text: str, **changes: Any) -> Self:
        """Parses timm's notation, such as "rand-m9-mstd0.5-inc1". Raises ValueError if a part of it is unknown."""
        kind, *parts = text.split("-")
        matches = [_NOTATION.fullmatch(part) for part in parts]
        if kind != "rand" or not all(matches):
            wrong = [part for part, match in zip(parts, matches) if not match] or [kind]
            raise InputError(
                f"RandAugment {text!r}: {', '.join(map(repr, wrong))} is unknown. Expected rand followed by any of "
                "-m9 -mstd0.5 -mmax10 -n2 -p0.5 -inc1, such as rand-m9-mstd0.5-inc1."
            )
        given = {match["key"]: float(match["value"]) for match in matches if match}
        std = given.get("mstd", 0.0)
        policy = cls(
            magnitude=given.get("m", _LARGEST),
            magnitude_std=float("inf") if std > 100 else std,
            magnitude_max=given.get("mmax", _LARGEST),
            operations=int(given.get("n", 2)),
            probability=given.get("p", 0.5),
            increasing=bool(given.get("inc", 0)),
        )
        return dataclasses.replace(policy, **changes)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the operations to choose from."""
        replaced = _INCREASING if self.increasing else {}
        return tuple(replaced.get(name, name) for name in _NAMES)

    def draw(self, rng: np.random.Generator) -> list[Operation]:
        """Operations for one image, drawn with replacement, each kept with the policy's probability."""
        drawn = [self._draw_one(rng) for _ in range(self.operations)]
        return [operation for operation in drawn if operation is not None]

    def _draw_one(self, rng: np.random.Generator) -> Operation | None:
        # Draws all numbers, needed or not, so that the next operation's draws do not depend on this one.
        name = self.names[rng.integers(len(_NAMES))]
        happens = rng.random() < self.probability
        noise, uniform = rng.standard_normal(), rng.random()
        negative = bool(rng.random() < 0.5)
        resample = self.resample[rng.integers(len(self.resample))]
        if not happens:
            return None
        if np.isinf(self.magnitude_std):
            magnitude = uniform * self.magnitude
        else:
            magnitude = self.magnitude + noise * self.magnitude_std
        return Operation(name, float(np.clip(magnitude, 0.0, self.magnitude_max)), negative, int(resample))

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The image after its random operations."""
        for operation in self.draw(rng):
            image = apply_operation(image, operation, self.fill)
        return image


def apply_operation(image: Image.Image, operation: Operation, fill: Fill) -> Image.Image:
    """The image after one operation; deterministic."""
    return OPERATIONS[operation.name](image, operation, fill)


def _signed(operation: Operation, full_strength: float) -> float:
    amount = operation.magnitude / _LARGEST * full_strength
    return -amount if operation.negative else amount


def _whole(operation: Operation, full_strength: float) -> int:
    return int(operation.magnitude / _LARGEST * full_strength)


def _affine(matrix: Callable[[Image.Image, Operation], tuple[float, ...]]) -> _Apply:
    return lambda image, operation, fill: image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix(image, operation),
        resample=Image.Resampling(operation.resample),
        fillcolor=fill,
    )


def _rotate(image: Image.Image, operation: Operation, fill: Fill) -> Image.Image:
    resample = Image.Resampling(operation.resample)
    return image.rotate(_signed(operation, 30.0), resample=resample, fillcolor=fill)


def _keep_bits(image: Image.Image, bits: int) -> Image.Image:
    """Keeps the highest bits of every value. 0 bits give black, as in the Pillow of the published models; Pillow 13
    raises."""
    mask = 256 - 2 ** (8 - min(8, max(0, bits)))
    return image.point([value & mask for value in range(256)] * len(image.getbands()))


def _solarize_add(image: Image.Image, operation: Operation, _: Fill) -> Image.Image:
    """Brightens the darker half of the values."""
    added = min(128, _whole(operation, 110))
    table = [min(255, value + added) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def _enhance(enhancer: Callable[[Image.Image], Any], *, increasing: bool) -> _Apply:
    """Blends the image with a degraded version; a factor of 1 changes nothing."""

    def factor_of(operation: Operation) -> float:
        if increasing:
            return max(0.1, 1.0 + _signed(operation, 0.9))
        return operation.magnitude / _LARGEST * 1.8 + 0.1

    return lambda image, operation, fill: enhancer(image).enhance(factor_of(operation))


OPERATIONS: dict[str, _Apply] = {
    "AutoContrast": lambda image, operation, fill: ImageOps.autocontrast(image),
    "Equalize": lambda image, operation, fill: ImageOps.equalize(image),
    "Invert": lambda image, operation, fill: ImageOps.invert(image),
    "Rotate": _rotate,
    "Posterize": lambda image, operation, fill: _keep_bits(image, _whole(operation, 4)),
    "PosterizeIncreasing": lambda image, operation, fill: _keep_bits(image, 4 - _whole(operation, 4)),
    "Solarize": lambda image, operation, fill: ImageOps.solarize(image, min(256, _whole(operation, 256))),
    "SolarizeIncreasing": lambda image, operation, fill: ImageOps.solarize(
        image, 256 - min(256, _whole(operation, 256))
    ),
    "SolarizeAdd": _solarize_add,
    "Color": _enhance(ImageEnhance.Color, increasing=False),
    "ColorIncreasing": _enhance(ImageEnhance.Color, increasing=True),
    "Contrast": _enhance(ImageEnhance.Contrast, increasing=False),
    "ContrastIncreasing": _enhance(ImageEnhance.Contrast, increasing=True),
    "Brightness": _enhance(ImageEnhance.Brightness, increasing=False),
    "BrightnessIncreasing": _enhance(ImageEnhance.Brightness, increasing=True),
    "Sharpness": _enhance(ImageEnhance.Sharpness, increasing=False),
    "SharpnessIncreasing": _enhance(ImageEnhance.Sharpness, increasing=True),
    "ShearX": _affine(lambda image, operation: (1, _signed(operation, 0.3), 0, 0, 1, 0)),
    "ShearY": _affine(lambda image, operation: (1, 0, 0, _signed(operation, 0.3), 1, 0)),
    "TranslateXRel": _affine(lambda image, operation: (1, 0, _signed(operation, 0.45) * image.width, 0, 1, 0)),
    "TranslateYRel": _affine(lambda image, operation: (1, 0, 0, 0, 1, _signed(operation, 0.45) * image.height)),
}
_INCREASING = {name.removesuffix("Increasing"): name for name in OPERATIONS if name.endswith("Increasing")}
_NAMES = tuple(name for name in OPERATIONS if not name.endswith("Increasing"))

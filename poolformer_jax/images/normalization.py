"""From 8-bit pixels to the network's input: rescaling and normalising.

Source: transformers, image_transforms.py, `rescale` and `normalize`, with their roundings.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32, Num, UInt8


@dataclasses.dataclass(frozen=True)
class Normalization:
    """`(pixels * factor - mean) / std` for each channel.

    Without a factor the pixels are not rescaled. Without mean and std they are not normalised. Mean and std have one
    number for each of the `channels`.
    """

    channels: int
    factor: float | None
    mean: Sequence[float] | None
    std: Sequence[float] | None

    def __call__(
        self, pixels: UInt8[np.ndarray, "*b h w c"] | Float[np.ndarray, "*b h w c"]
    ) -> Float32[np.ndarray, "*b h w c"]:
        """The pixels rescaled and normalised; 8 bits are looked up in a table."""
        if pixels.dtype == np.uint8:
            values = np.repeat(np.arange(256, dtype=np.float32)[:, None], self.channels, -1)
            table = self._compute(values).T
            return np.stack([table[channel][pixels[..., channel]] for channel in range(self.channels)], axis=-1)
        return self._compute(pixels).astype(np.float32)

    def _compute(self, pixels: Num[np.ndarray, "*b c"]) -> Float[np.ndarray, "*b c"]:
        # Rounded to float32, or the type of the pixels, after each step as in transformers.
        if self.factor is not None:
            pixels = (pixels.astype(np.float64) * self.factor).astype(np.float32)
        if self.mean is not None:
            pixels = (pixels - np.asarray(self.mean, pixels.dtype)) / np.asarray(self.std, pixels.dtype)
        return pixels

    def scale_and_shift(self) -> tuple[Float32[np.ndarray, " c"], Float32[np.ndarray, " c"]]:
        """`scale`, `shift` such that `pixels * scale + shift` is the same to float32 rounding."""
        scale = np.full(self.channels, 1.0 if self.factor is None else self.factor)
        shift = np.zeros(self.channels)
        if self.mean is not None and self.std is not None:
            scale, shift = scale / self.std, -np.divide(self.mean, self.std)
        return scale.astype(np.float32), shift.astype(np.float32)

    def unit_mean_and_std(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation per channel of the same normalisation of pixels in 0..1."""
        unit = 255 * (1 if self.factor is None else self.factor)
        unchanged = (0.0,) * self.channels, (1.0,) * self.channels
        mean, std = unchanged if self.mean is None or self.std is None else (self.mean, self.std)
        return [value / unit for value in mean], [value / unit for value in std]

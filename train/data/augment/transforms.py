"""The transform of one training example. Evaluation uses the image processor."""

from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from poolformer_jax.images import read_image
from train.data.augment.color_jitter import jitter_colors
from train.data.augment.crops import Box, random_resized_box, shift_and_rotate
from train.data.augment.decode import decode_crop
from train.data.augment.random_augment import RandAugment
from train.data.augment.resizing import choose_resizer, resize, to_picture, to_pixels
from train.data.config import DataConfig

_FILTERS = {
    "random": (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC),
    "bilinear": (Image.Resampling.BILINEAR,),
    "bicubic": (Image.Resampling.BICUBIC,),
}


class TrainingTransform:
    """Random crop, flips, RandAugment, colour jitter, shift and rotation; all random numbers are the generator's."""

    def __init__(self, config: DataConfig) -> None:
        augment = config.augment
        self._augment = augment
        self._size = config.image_size
        self._channels = config.num_channels
        self._filters = _FILTERS[augment.interpolation]
        self._resizer = choose_resizer(augment.resizer)
        self._processor = config.image_processor()
        self._policy = None
        if augment.randaugment != "none":
            fill = tuple(min(255, round(255 * mean)) for mean in config.image_mean)
            self._policy = RandAugment.from_notation(
                augment.randaugment,
                fill=fill if len(fill) > 1 else fill[0],
                resample=tuple(int(resample) for resample in self._filters),
            )

    def __call__(self, image: Any, rng: np.random.Generator) -> UInt8[np.ndarray, "h w c"]:
        """The pixels for an image file's bytes or an array of pixels. Raises ImageError if the image cannot be read."""
        pixels = self._crop(image, rng)
        if rng.random() < self._augment.horizontal_flip:
            pixels = _mirror(pixels)
        if self._augment.vertical_flip and rng.random() < self._augment.vertical_flip:
            pixels = np.ascontiguousarray(pixels[::-1])
        jitters = any(self._augment.color_jitter)
        if self._policy is None and not jitters and self._augment.max_shift == self._augment.max_rotation == 0:
            return pixels
        picture = to_picture(pixels)
        if self._policy is not None:
            picture = self._policy(picture, rng)
        if jitters:
            picture = jitter_colors(picture, self._augment.color_jitter, rng)
        return to_pixels(shift_and_rotate(picture, self._augment.max_shift, self._augment.max_rotation, rng))

    def _crop(self, image: Any, rng: np.random.Generator) -> UInt8[np.ndarray, "h w c"]:
        if self._augment.crop == "evaluation":
            return self._processor.resize_and_crop(image)
        resample = self._filters[rng.integers(len(self._filters))]

        def choose_box(width: int, height: int) -> Box:
            return random_resized_box(width, height, self._augment.crop_scale, self._augment.crop_ratio, rng)

        if isinstance(image, bytes):
            return decode_crop(
                image,
                choose_box,
                self._size,
                resample,
                num_channels=self._channels,
                scaled_decoding=self._augment.scaled_decoding,
                resizer=self._resizer,
            )
        picture = read_image(image, self._channels)
        part = picture.crop(choose_box(*picture.size))
        return resize(to_pixels(part), self._size, resample, self._resizer)


def _mirror(pixels: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w c"]:
    result = np.empty_like(pixels)
    for channel in range(pixels.shape[-1]):  # four times as fast as all channels at once
        result[..., channel] = pixels[:, ::-1, channel]
    return result

"""Images as timm's validate.py sees them, for counts that are equal to its counts.

Source: timm, data/readers and data/transforms_factory.py; torchvision, `center_crop`.
"""

import dataclasses
from io import BytesIO

import numpy as np
from jaxtyping import UInt8

from poolformer_jax import PoolFormerImageProcessor
from poolformer_jax.images import ImageLike, open_image, raising_image_errors


@dataclasses.dataclass(frozen=True)
class TimmImageProcessor(PoolFormerImageProcessor):
    """The preprocessing of inference, but pictures stay as they are stored, and half pixels are rounded to even.

    Inference turns pictures upright by their EXIF. A crop that would begin at half a pixel begins at the pixel before.
    """

    def resize_and_crop(
        self, image: ImageLike, *, input_data_format: str | None = None, to_even: bool = True
    ) -> UInt8[np.ndarray, "h w c"]:
        """As in `PoolFormerImageProcessor`."""
        if isinstance(image, bytes):
            file = BytesIO(image)
            name = f"the {len(image)} bytes given"
            with raising_image_errors(name, file), open_image(file, name) as stored:
                image = stored.convert("L" if self.num_channels == 1 else "RGB")
            image.info.clear()  # the EXIF
        return super().resize_and_crop(image, input_data_format=input_data_format, to_even=to_even)

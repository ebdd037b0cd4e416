"""Makes image_processor.npz: the pixels of transformers' image processor of PoolFormer, Pillow backend.

Needs torch and transformers; transformers 5.24 and Pillow 13.0.0 made the file in the repository.

    python tests/golden/make_image_processor.py
"""

from pathlib import Path

import numpy as np
from image_processor_cases import images, is_comparable, keywords, sample
from PIL import Image
from transformers.models.poolformer.image_processing_pil_poolformer import PoolFormerImageProcessorPil

FOLDER = Path(__file__).parent
PHOTOGRAPHS = sorted((FOLDER.parent / "images").glob("*.*g"))


def channels_last(inputs) -> np.ndarray:
    """The batch as [batch, height, width, channels]."""
    return np.stack([np.moveaxis(np.asarray(pixels), 0, -1) for pixels in inputs["pixel_values"]])


def photographs() -> dict[str, np.ndarray]:
    """2048 values and the means of each photograph, for both published crops and two sizes."""
    result = {}
    for path in PHOTOGRAPHS:
        for crop_pct in (0.9, 0.95):
            for size in (224, 64):
                processor = PoolFormerImageProcessorPil(size=size, crop_size=size, crop_pct=crop_pct)
                (pixels,) = channels_last(processor(Image.open(path).convert("RGB")))
                key = f"{path.name}/crop{crop_pct}/size{size}"
                index = np.random.default_rng(0).choice(pixels.size, 2048, replace=False)
                result[f"{key}/shape"], result[f"{key}/index"] = np.array(pixels.shape), index
                result[f"{key}/value"] = pixels.ravel()[index]
                result[f"{key}/channel_mean"] = pixels.mean((0, 1), dtype=np.float64)
    return result


def cases() -> dict[str, np.ndarray]:
    """For every image of `image_processor_cases` the shapes and `sample` of all comparable keywords, in their order."""
    result = {}
    for name, image in images().items():
        comparable = [case for case in keywords() if is_comparable(name, case)]
        pixels = [channels_last(PoolFormerImageProcessorPil()(image, **case)) for case in comparable]
        result[f"cases/{name}/shape"] = np.array([each.shape for each in pixels], np.int16)
        result[f"cases/{name}/value"] = np.stack([sample(each) for each in pixels])
    return result


if __name__ == "__main__":
    np.savez_compressed(FOLDER / "image_processor.npz", **photographs(), **cases())

"""Makes randaugment.npz: the results of timm's augmentation operations on two photographs, one operation at a time.

Needs timm; timm 1.0.31 and Pillow 13.0.0 made the file in the repository. timm's two random sources are replaced to fix
every choice: `random.random` decides the direction, `random.choice` the filter.

    python tests/golden/make_randaugment.py
"""

import importlib.util
import random
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
from PIL import Image

IMAGES = Path(__file__).parent.parent / "images"
MAGNITUDES = (0.0, 2.5, 5.0, 9.0, 9.37, 10.0)
MOVING = ("Rotate", "Shear", "Translate")  # the operations that use a filter
FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
FILL = (124, 116, 104)  # ImageNet's mean


def load_auto_augment() -> ModuleType:
    """Loads timm/data/auto_augment.py alone, without timm's __init__, which imports torch and torchvision."""
    package = importlib.util.find_spec("timm")
    path = Path(package.origin).parent / "data" / "auto_augment.py"
    spec = importlib.util.spec_from_file_location("auto_augment", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def photographs() -> np.ndarray:
    """Two small photographs: uint8 [2, 32, 44, 3]."""
    pictures = [Image.open(IMAGES / name).convert("RGB").resize((44, 32)) for name in ("astronaut.jpg", "coffee.jpg")]
    return np.stack([np.asarray(picture) for picture in pictures])


def posterized_bits(name: str, magnitude: float) -> int:
    """Bits of each value that timm keeps."""
    bits = int(magnitude / 10 * 4)
    return 4 - bits if name == "PosterizeIncreasing" else bits


def main() -> None:
    """Writes the file next to this one."""
    timm = load_auto_augment()
    images = photographs()
    names, magnitudes, negatives, resamples, results = [], [], [], [], []
    operations = sorted({*timm._RAND_TRANSFORMS, *timm._RAND_INCREASING_TRANSFORMS})
    for name in operations:
        for magnitude in MAGNITUDES:
            for negative in (False, True):
                for resample in FILTERS if name.startswith(MOVING) else FILTERS[:1]:
                    if "Posterize" in name and posterized_bits(name, magnitude) == 0:
                        continue  # Pillow 13 refuses 0 bits, which used to give a black image
                    operation = timm.AugmentOp(name, prob=1.0, magnitude=magnitude, hparams={"img_mean": FILL})
                    with (
                        mock.patch.object(random, "random", return_value=0.9 if negative else 0.1),
                        mock.patch.object(random, "choice", return_value=resample),
                    ):
                        result = np.stack([np.asarray(operation(Image.fromarray(image))) for image in images])
                    names.append(name)
                    magnitudes.append(magnitude)
                    negatives.append(negative)
                    resamples.append(int(resample))
                    results.append(result)
    np.savez_compressed(
        Path(__file__).with_name("randaugment.npz"),
        images=images,
        names=np.array(names),
        magnitudes=np.array(magnitudes),
        negatives=np.array(negatives),
        resamples=np.array(resamples),
        results=np.stack(results),
        increasing=np.array(timm._RAND_INCREASING_TRANSFORMS),
        plain=np.array(timm._RAND_TRANSFORMS),
    )


if __name__ == "__main__":
    main()

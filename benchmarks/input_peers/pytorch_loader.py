"""A PyTorch DataLoader with Pillow transforms, as torchvision and timm users write it. Started by input_pipeline.py.

    python pytorch_loader.py FOLDER BATCH [--randaugment] [--float]

Reads a number N per line from stdin, makes N batches, and answers "done". Batches are uint8, as timm's CUDA prefetcher
takes them, or normalised float32, as torchvision's ToTensor and Normalize make them.
"""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import torch
from crops import crop_window
from PIL import Image, ImageEnhance, ImageOps

FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
FILL = (124, 116, 104)
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class Photographs(torch.utils.data.Dataset):
    """Class folders, decoded, cropped, flipped and augmented."""

    def __init__(self, folder: Path, randaugment: bool, normalize: bool) -> None:
        self.files = sorted(folder.glob("*/*.jpg"))
        self.labels = {name: label for label, name in enumerate(sorted({file.parent.name for file in self.files}))}
        self.randaugment = randaugment
        self.normalize = normalize

    def __len__(self) -> int:
        return 1_000_000  # so that no epoch ends during a measurement

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        file = self.files[index % len(self.files)]
        with file.open("rb") as opened:
            image = Image.open(opened).convert("RGB")
        image = random_resized_crop(image)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.randaugment:
            image = rand_augment(image)
        pixels = torch.from_numpy(np.array(image).transpose(2, 0, 1))
        if self.normalize:
            pixels = pixels.contiguous().to(torch.float32).div(255).sub_(MEAN).div_(STD)
        return pixels, self.labels[file.parent.name]


def random_resized_crop(image: Image.Image) -> Image.Image:
    """A random window, resized to 224 pixels."""
    top, left, h, w = crop_window(*image.size)
    return image.crop((left, top, left + w, top + h)).resize((224, 224), random.choice(FILTERS))


def rand_augment(image: Image.Image) -> Image.Image:
    """Two of timm's increasing operations, each with probability 1/2."""
    for operation in random.choices(OPERATIONS, k=2):
        if random.random() < 0.5:
            level = min(10.0, max(0.0, random.gauss(9, 0.5))) / 10
            image = operation(image, level, level if random.random() < 0.5 else -level)
    return image


def _move(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=random.choice(FILTERS), fillcolor=FILL)


def _solarize_add(image: Image.Image, level: float) -> Image.Image:
    return image.point([min(255, v + int(level * 110)) if v < 128 else v for v in range(256)] * 3)


OPERATIONS: list[Callable[[Image.Image, float, float], Image.Image]] = [
    lambda image, level, signed: ImageOps.autocontrast(image),
    lambda image, level, signed: ImageOps.equalize(image),
    lambda image, level, signed: ImageOps.invert(image),
    lambda image, level, signed: image.rotate(signed * 30, resample=random.choice(FILTERS), fillcolor=FILL),
    lambda image, level, signed: ImageOps.posterize(image, max(1, 4 - int(level * 4))),
    lambda image, level, signed: ImageOps.solarize(image, 256 - int(level * 256)),
    lambda image, level, signed: _solarize_add(image, level),
    lambda image, level, signed: ImageEnhance.Color(image).enhance(max(0.1, 1 + signed * 0.9)),
    lambda image, level, signed: ImageEnhance.Contrast(image).enhance(max(0.1, 1 + signed * 0.9)),
    lambda image, level, signed: ImageEnhance.Brightness(image).enhance(max(0.1, 1 + signed * 0.9)),
    lambda image, level, signed: ImageEnhance.Sharpness(image).enhance(max(0.1, 1 + signed * 0.9)),
    lambda image, level, signed: _move(image, (1, signed * 0.3, 0, 0, 1, 0)),
    lambda image, level, signed: _move(image, (1, 0, 0, signed * 0.3, 1, 0)),
    lambda image, level, signed: _move(image, (1, 0, signed * 0.45 * image.width, 0, 1, 0)),
    lambda image, level, signed: _move(image, (1, 0, 0, 0, 1, signed * 0.45 * image.height)),
]


def main() -> None:
    """Makes batches until stdin ends."""
    torch.set_num_threads(1)
    photographs = Photographs(Path(sys.argv[1]), "--randaugment" in sys.argv, "--float" in sys.argv)
    batch = int(sys.argv[2])
    loader = torch.utils.data.DataLoader(photographs, batch_size=batch, shuffle=True, num_workers=1, prefetch_factor=2)
    batches = iter(loader)
    next(batches)[0].clone()
    print(json.dumps({"torch": torch.__version__, "pillow": PIL.__version__}), flush=True)
    for line in sys.stdin:
        for _ in range(int(line)):
            next(batches)[0].clone()
        print("done", flush=True)


if __name__ == "__main__":
    main()

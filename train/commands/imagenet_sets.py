"""The test sets that share ImageNet's classes and need more than an accuracy: ReaL labels, ImageNet-C, timm's table.

Sources: "Are we done with ImageNet?" (arXiv 2006.07159); "Benchmarking Neural Network Robustness to Common Corruptions
and Perturbations" (arXiv 1903.12261); timm, validate.py and data/real_labels.py.
"""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from poolformer_jax import PoolFormerImageProcessor
from poolformer_jax.errors import InputError
from poolformer_jax.files import LARGEST_JSON, check_file, replace_atomically
from poolformer_jax.messages import first_few
from train.compute import Predictions
from train.data import Source

SEVERITIES = range(1, 6)
# ImageNet-C's corruptions, with AlexNet's mean error over the five severities (hendrycks/robustness, ImageNet-C).
ALEXNET_ERRORS: Mapping[str, float] = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
_VALIDATION_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")


def read_real_labels(path: Path) -> list[list[int]]:
    """The labels of real.json, by the number of the validation image: any number of classes for each.

    Raises InputError if the file is not a JSON list of lists of numbers.
    """
    path = path.expanduser()
    check_file(path, LARGEST_JSON, "real.json of google-research")
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}. Expected real.json of google-research.") from error
    if not isinstance(labels, list) or not all(isinstance(row, list) for row in labels):
        raise InputError(f"{path} is not a list with a list of labels for each image. Expected real.json.")
    return labels


def score_real_labels(
    predictions: Predictions, source: Source, real: Sequence[Sequence[int]]
) -> tuple[int, float, float]:
    """Images with ReaL labels, and the shares with one of them as the best answer and among the five best.

    Raises InputError if an image is not named ILSVRC2012_val_00000001.JPEG and so on.
    """
    best = np.argsort(-predictions.logits, axis=1, kind="stable")[:, :5]
    hits = []
    for row, index in enumerate(predictions.index):
        name = source[int(index)]["id"]
        found = _VALIDATION_NUMBER.findall(name)
        if not found or not 1 <= int(found[-1]) <= len(real):
            raise InputError(
                f"{name} is not an image of ImageNet's validation split with ReaL labels. Expected names from "
                f"ILSVRC2012_val_00000001 to ILSVRC2012_val_{len(real):08d}."
            )
        if labels := real[int(found[-1]) - 1]:
            right = np.isin(best[row], labels)
            hits.append((right[0], right.any()))
    if not hits:
        raise InputError("No image of the split has ReaL labels.")
    top1, top5 = np.mean(hits, axis=0)
    return len(hits), float(top1), float(top5)


def corruption_folders(root: Path) -> dict[tuple[str, int], Path]:
    """The class folders of each corruption and severity: PATH/fog/3, or PATH/weather/fog/3, as the archives have them.

    Raises InputError, naming what is missing.
    """
    folders: dict[tuple[str, int], Path] = {}
    for corruption in ALEXNET_ERRORS:
        parents = [root, *sorted(path for path in root.iterdir() if path.is_dir())] if root.is_dir() else []
        parent = next((path for path in parents if (path / corruption).is_dir()), root)
        folders |= {(corruption, severity): parent / corruption / str(severity) for severity in SEVERITIES}
    if missing := [f"{name}/{severity}" for (name, severity), path in folders.items() if not path.is_dir()]:
        raise InputError(
            f"imagenet-c:{root} lacks {first_few(missing)} ({len(missing)} of {len(folders)} folders). Expected the 15 "
            "corruptions of ImageNet-C, each with the severities 1 to 5."
        )
    return folders


def mean_corruption_error(errors: Mapping[str, Sequence[float]]) -> tuple[float, dict[str, float]]:
    """mCE and the corruption errors CE: the mean error of the severities, divided by AlexNet's.

    Args:
        errors: of each corruption, the top-1 errors of its five severities.
    """
    relative = {name: float(np.mean(errors[name])) / reference for name, reference in ALEXNET_ERRORS.items()}
    return float(np.mean(list(relative.values()))), relative


def write_results_row(
    path: Path, model: str, top1: float, top5: float, parameters: int, processor: PoolFormerImageProcessor
) -> None:
    """Adds a row with the columns of timm's validate.py to a CSV file; accuracies are in percent.

    A row of the same model is replaced.
    """
    assert processor.output_size is not None
    row: dict[str, Any] = {
        "model": model,
        "top1": round(100 * top1, 4),
        "top1_err": round(100 - 100 * top1, 4),
        "top5": round(100 * top5, 4),
        "top5_err": round(100 - 100 * top5, 4),
        "param_count": round(parameters / 1e6, 2),
        "img_size": processor.output_size[-1],
        "crop_pct": processor.crop_pct,
        "interpolation": Image.Resampling(processor.resample).name.lower(),
    }
    rows = []
    if path.exists():
        check_file(path, LARGEST_JSON, "a table of results, or a new file")
        with path.open(newline="", encoding="utf-8") as file:
            rows = [other for other in csv.DictReader(file) if other.get("model") != model]
        if rows and list(rows[0]) != list(row):
            raise InputError(f"{path} has other columns than {', '.join(row)}. Expected another --results-file.")
    with replace_atomically(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerows([*rows, row])

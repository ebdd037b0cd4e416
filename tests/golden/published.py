"""Reads the golden arrays: what the published PyTorch models compute. README.md describes them."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from golden import fixture_values

FOLDER = Path(__file__).parent
LAYOUTS = ("hf", "sail", "timm")
VARIANTS = ("s12", "s24", "s36", "m36", "m48")
ABLATIONS = (
    "metaformer_id_s12",
    "metaformer_pppa_s12_224",
    "metaformer_ppaa_s12_224",
    "metaformer_pppf_s12_224",
    "metaformer_ppff_s12_224",
)


def shapes(layout: str, variant: str) -> dict[str, tuple[int, ...]]:
    """PyTorch name -> shape, in state-dict order."""
    listing = json.loads((FOLDER / f"{layout}_{variant}.json").read_text())
    return {name: tuple(shape) for name, shape in listing.items()}


def state_dict(layout: str, variant: str) -> dict[str, np.ndarray]:
    """The weights with which the golden arrays were computed."""
    return {name: fixture_values.parameter(name, shape) for name, shape in shapes(layout, variant).items()}


def arrays(layout: str, variant: str) -> Mapping[str, np.ndarray]:
    with np.load(FOLDER / f"{layout}_{variant}.npz") as archive:
        return dict(archive)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A sample of one stage's output, stored in PyTorch's NCHW order."""

    shape_nchw: tuple[int, ...]
    index: np.ndarray
    value: np.ndarray
    mean_std: np.ndarray


def stages(golden: Mapping[str, np.ndarray], size: str) -> Iterator[Stage]:
    number = 0
    while f"{size}/stage{number}/value" in golden:
        part = {key: golden[f"{size}/stage{number}/{key}"] for key in ("shape_nchw", "index", "value", "mean_std")}
        yield Stage(**{**part, "shape_nchw": tuple(int(n) for n in part["shape_nchw"])})
        number += 1


def pixel_values(size: str) -> np.ndarray:
    """The input "HxW" as NHWC float32."""
    height, width = map(int, size.split("x"))
    return fixture_values.pixels(f"pixels/{size}", (2, 3, height, width)).transpose(0, 2, 3, 1)

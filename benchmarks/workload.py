"""The work of one implementation inside its process, and the inputs it reads.

Nothing here imports jax, which must not run in the process of another library.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Workload:
    """What is timed, ready to run."""

    call: Callable[[], Any]  # does the work once and returns when the result is ready
    result: np.ndarray  # numbers that all implementations must agree on: logits, or the losses of the first steps
    versions: Mapping[str, str]  # versions of the libraries that do the work
    threads: int
    facts: Mapping[str, Any] = field(default_factory=dict)  # further entries for the JSON report


def read_pixels(folder: str) -> np.ndarray:
    """The normalised images that `inputs` wrote, [batch, height, width, 3], float32."""
    return np.load(Path(folder) / "pixels.npy")


def read_labels(folder: str) -> np.ndarray:
    """The class of each image, [batch]."""
    return np.load(Path(folder) / "labels.npy")

"""What a contender of a benchmark is inside its own process: something to call again and again, and what it is given.

Nothing here imports jax, which has no business in a peer's process.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Job:
    """A contender, made ready.

    Args:
        call: does the work once, and returns when it is done.
        result: numbers that must agree with those of the other contenders: logits, or losses of the first steps.
        versions: of what does the work.
        threads: how many it computes with.
        facts: what else the report should hold.
    """

    call: Callable[[], Any]
    result: np.ndarray
    versions: Mapping[str, str]
    threads: int
    facts: Mapping[str, Any] = field(default_factory=dict)


def read_pixels(folder: str) -> np.ndarray:
    """The normalised images that `inputs` wrote, [batch, height, width, 3], float32."""
    return np.load(Path(folder) / "pixels.npy")


def read_labels(folder: str) -> np.ndarray:
    """A class for each of them."""
    return np.load(Path(folder) / "labels.npy")

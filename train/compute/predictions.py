"""The outputs of a network for a whole split, which figures and reports are computed from on the host."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The outputs for all examples of a split that could be read, in its order."""

    index: np.ndarray  # each example's place in the split, int64 [n]
    label: np.ndarray  # its correct class, int32 [n], or its targets, float32 [n, classes]
    logits: np.ndarray  # the logits, or the numbers of a regression, float32 [n, classes]

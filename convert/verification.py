"""Whether a converted folder holds what its source holds: every bit, and with PyTorch every stage's output."""

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from convert import pytorch
from convert.conversion import Mapped, Source
from poolformer_jax.weights.containers.files import open_weights
from poolformer_jax.weights.names import TRANSFORMS
from poolformer_jax.weights.pretrained import load_pretrained
from poolformer_jax.weights.source import find_model_files

# Of the largest value of a stage: float32 sums in another order. A wrong transform or name is off by its whole size.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Verification:
    """What was compared, and what came of it.

    Args:
        arrays: how many arrays were read back and led back to the source's layout.
        different: names of those that are not the source's, bit for bit.
        differences: largest difference from PyTorch by stage and for the logits, as a share of the largest value.
        not_compared: why PyTorch was not asked; None if it was.
        tolerance: the difference up to which outputs count as the same.
    """

    arrays: int
    different: tuple[str, ...]
    differences: dict[str, float]
    not_compared: str | None
    tolerance: float = TOLERANCE

    @property
    def first_difference(self) -> str | None:
        """The first stage whose output differs from PyTorch's; None if none does."""
        # A comparison that is false also for NaN.
        return next((name for name, value in self.differences.items() if not value <= self.tolerance), None)

    @property
    def passed(self) -> bool:
        return not self.different and self.first_difference is None


def verify(source: Source, destination: Path, mapped: list[Mapped]) -> Verification:
    """Reads the folder `destination` again and compares it with `source`."""
    different = _different(source, destination, mapped)
    reason = pytorch.why_not(source)
    return Verification(len(mapped), different, {} if reason else _differences(source, destination), reason)


def _different(source: Source, destination: Path, mapped: list[Mapped]) -> tuple[str, ...]:
    written = open_weights(find_model_files(destination).weights).tensors
    different = []
    for one in mapped:
        here = TRANSFORMS[one.target.transform].here(np.asarray(written[one.target.name]))
        back = np.ascontiguousarray(TRANSFORMS[one.source.transform].there(here))
        original = np.ascontiguousarray(np.asarray(source.weights.tensors[one.given_name]).astype(np.float32))
        # Bits, not values: NaN equals itself, and -0.0 is not 0.0.
        if back.shape != original.shape or not np.array_equal(back.view(np.uint32), original.view(np.uint32)):
            different.append(one.given_name)
    return tuple(different)


def _differences(source: Source, destination: Path) -> dict[str, float]:
    model, variables = load_pretrained(destination)
    side = source.config.image_size or max(64, 2 * source.config.smallest_side)
    shape = (2, side, side, source.config.num_channels)
    pixel_values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    theirs = pytorch.outputs(source, pixel_values, model.config.head_order)
    output = jax.jit(model.apply)(variables, pixel_values)
    ours = {f"stage {index}": stage for index, stage in enumerate(output.hidden_states)} | {"logits": output.logits}
    return {name: relative_difference(np.asarray(ours[name]), theirs[name]) for name in theirs}


def relative_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest distance, as a share of the largest value of `theirs`."""
    if ours.shape != theirs.shape:
        return float("inf")
    largest = np.abs(ours - theirs).max()
    return float(largest / np.abs(theirs).max()) if largest else 0.0  # a head of zeros has no largest value

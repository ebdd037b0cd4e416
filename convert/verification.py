"""Compares a converted folder with its source: every bit, and every stage's output with PyTorch's."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from convert import pytorch
from convert.conversion import ArrayMapping
from poolformer_jax.weights import TRANSFORMS, OpenedModel, build_model, open_model

# Relative to the largest value of a stage, for float32 sums in another order. Wrong transforms or names differ by 1.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Verification:
    """The result of a comparison."""

    arrays: int  # number of arrays that were read back and transformed to the source's layout
    different: tuple[str, ...]  # names of the arrays that differ in some bit
    # Largest difference from PyTorch for each stage and the logits, relative to the largest value.
    differences: dict[str, float]
    not_compared: str | None  # why the outputs were not compared with PyTorch's; None if they were
    # What no array shows, so that PyTorch computed the same assumption; None if nothing was assumed.
    not_verified: str | None = None
    # Largest difference of the folder's logits from the source's, relative to the largest, if the head of the layout's
    # model has another order or epsilon; None if it is alike.
    head_order_difference: float | None = None
    tolerance: float = TOLERANCE  # the largest difference of equal outputs

    @property
    def first_difference(self) -> str | None:
        """The first stage whose output differs from PyTorch's; None if all are equal."""
        # `not <=` is also true for NaN.
        return next((name for name, value in self.differences.items() if not value <= self.tolerance), None)

    @property
    def passed(self) -> bool:
        return not self.different and self.first_difference is None


def verify(source: OpenedModel, destination: Path, mappings: list[ArrayMapping]) -> Verification:
    """Reads the folder `destination` again and compares it with `source`."""
    written = open_model(destination)
    different = _different_arrays(source, written, mappings)
    reason = pytorch.reason_not_to_compare(source, written.config.head_order)
    return Verification(
        len(mappings),
        different,
        {} if reason else _differences(source, written),
        reason,
        source.assumed,
        _head_order_difference(source, written),
    )


def _different_arrays(source: OpenedModel, written: OpenedModel, mappings: list[ArrayMapping]) -> tuple[str, ...]:
    different = []
    for one in mappings:
        here = TRANSFORMS[one.target.transform].to_tree(np.asarray(written.weights.tensors[one.target.name]))
        back = np.ascontiguousarray(TRANSFORMS[one.source.transform].to_layout(here))
        original = np.ascontiguousarray(np.asarray(source.weights.tensors[one.given_name]).astype(np.float32))
        # Bits instead of values: NaN equals itself, and -0.0 differs from 0.0.
        if back.shape != original.shape or not np.array_equal(back.view(np.uint32), original.view(np.uint32)):
            different.append(one.given_name)
    return tuple(different)


def _differences(source: OpenedModel, written: OpenedModel) -> dict[str, float]:
    model, variables = build_model(written)
    # PyTorch computes with the source's epsilon; `_head_order_difference` says what another one changes.
    config = dataclasses.replace(model.config, head_norm_epsilon=source.config.head_norm_epsilon)
    model = model.clone(config=config)
    pixel_values = _pixel_values(source)
    theirs = pytorch.outputs(source, pixel_values, model.config.head_order)
    output = jax.jit(model.apply)(variables, pixel_values)
    ours = {f"stage {index}": stage for index, stage in enumerate(output.hidden_states)} | {"logits": output.logits}
    return {name: relative_difference(np.asarray(ours[name]), theirs[name]) for name in theirs}


def _head_order_difference(source: OpenedModel, written: OpenedModel) -> float | None:
    """How far the folder's logits are from the source's if its head has another order or epsilon; None if not."""
    if all(getattr(written.config, name) == getattr(source.config, name) for name in _HEAD_FIELDS):
        return None
    pixel_values = _pixel_values(source)
    logits = []
    for opened in (written, source):
        model, variables = build_model(opened)
        logits.append(np.asarray(jax.jit(model.apply)(variables, pixel_values).logits))
    return relative_difference(*logits)


_HEAD_FIELDS = ("head_order", "head_norm_epsilon")  # what the code of a layout fixes


def _pixel_values(source: OpenedModel) -> np.ndarray:
    side = source.config.image_size or max(64, 2 * source.config.smallest_side)
    shape = (2, side, side, source.config.num_channels)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def relative_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest value of `theirs`."""
    if ours.shape != theirs.shape:
        return float("inf")
    largest = np.abs(ours - theirs).max()
    return float(largest / np.abs(theirs).max()) if largest else 0.0  # both may be all zeros

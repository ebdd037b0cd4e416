"""Checks that a converted network computes the logits of the model."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from poolformer_jax.errors import InputError
from poolformer_jax.images import PoolFormerImageProcessor
from poolformer_jax.network import PoolFormerConfig, PoolFormerForImageClassification

# Relative to the largest logit, by the type of the feature maps, or by float16 or int8 of the stored numbers. Rounding
# stays well below; a wrong operation does not.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2, "int8": 0.2}


class ExportError(InputError):
    """The logits of a converted network differ from those of the model."""


def check_finite(*outputs: np.ndarray | float) -> None:
    """Raises InputError if the network computed infinite values or no numbers."""
    if not all(np.isfinite(output).all() for output in outputs):
        raise InputError(
            "The network computes infinite values or no numbers. Expected finite weights, and float32 if a smaller "
            "type overflows; check them."
        )


def difference_from_network(
    run: Callable[[np.ndarray], np.ndarray | None],
    config: PoolFormerConfig,
    variables: Mapping[str, Any],
    image_size: tuple[int, int],
    dtype: str,
    *,
    normalization: PoolFormerImageProcessor | None = None,
) -> float | None:
    """How much the converted logits of two random images differ from the float32 model's, which is not folded.

    Args:
        run: the converted network; returns None where it cannot run.
        config: the architecture.
        variables: `{"params": tree}`.
        image_size: height and width of the input in pixels.
        dtype: a key of `TOLERANCES`, the type that the converted network computes feature maps in.
        normalization: the converted network takes uint8 pixels and normalises them as this processor does.

    Returns:
        The largest difference, relative to the largest logit (absolute if all logits are 0); None if `run` returned
        None.

    Raises:
        ValueError: if the network's own logits are not finite.
        ExportError: if the difference is too large for rounding.
    """
    rng, shape = np.random.default_rng(0), (2, *image_size, config.num_channels)
    if normalization is None:
        pixels = rng.standard_normal(shape, np.float32)
        logits = run(pixels)
    else:
        images = rng.integers(0, 256, shape, np.uint8)
        logits, pixels = run(images), normalization.normalize(images)
    if logits is None:
        return None
    output: Any = jax.jit(PoolFormerForImageClassification(config).apply)(variables, pixels)
    expected = np.asarray(output.logits)
    check_finite(expected)
    if logits.shape != expected.shape:
        raise ExportError(f"The converted network has logits of shape {logits.shape}. Expected {expected.shape}.")
    difference = float(np.abs(logits - expected).max() / (np.abs(expected).max() or 1))
    if not difference <= TOLERANCES[dtype]:
        raise ExportError(
            f"The converted network computes other logits: they differ by {difference:.1e} of the largest one. "
            f"Expected at most {TOLERANCES[dtype]:.0e}. Either the file was exported from other weights, or this is a "
            "bug: please report it with the versions of jax, onnx and onnxruntime."
        )
    return difference

"""What can be said of a state's arrays in a few bytes: their types and shapes, and a fingerprint of each."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt32

from train.compute.state import TrainState


def array_types(state: TrainState) -> dict[str, str]:
    """Type and shape of every array, by name."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in zip(_names(state), jax.tree.leaves(state))}


def fingerprints(state: TrainState) -> dict[str, int]:
    """A 32-bit fingerprint of every array, by name; the same on any mesh, and different if any one bit is."""
    return dict(zip(_names(state), map(int, jax.device_get(_fingerprint_leaves(state)))))


def _names(state: TrainState) -> list[str]:
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(state)]


@jax.jit
def _fingerprint_leaves(state: Any) -> list[UInt32[Array, ""]]:
    return [_fingerprint(array) for array in jax.tree.leaves(state)]


def _fingerprint(array: Array) -> UInt32[Array, ""]:
    """Sum of the bits as 32-bit words, each times an odd number of its place, modulo 2**32.

    Additions modulo 2**32 may be done in any order, so the result does not depend on how the array is cut up. A
    changed word changes its own term, because multiplication by an odd number can be undone.
    """
    size = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[array.dtype.itemsize]
    words = lax.bitcast_convert_type(array, size).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        place = place * np.uint32(words.shape[axis]) + lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)

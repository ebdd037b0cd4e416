"""Computes a batch a few images at a time, so that their feature maps stay in a CPU's caches.

A CPU computes a block faster than its memory delivers the feature maps. A few images stay in the caches from the first
pass over them to the last. All microbatches use the same few megabytes: allocating the hidden layers of a whole batch
in every step would cost more than the arithmetic on them.

With several CPU devices, XLA moves images between them for this. Training does so only in tests; inference computes
each device's images separately (`inference.program.shard_on_cpu`).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Float

from poolformer_jax.network.fused.sharding_types import match_varying_axes

MICROBATCH_BYTES = 2**20
"""Size of a microbatch's feature map. Its hidden layer is four times as large: products run at full speed."""

SAVE_HIDDEN_CHANNELS = 256
"""From this width on, save the hidden layer for the backward pass instead of recomputing it."""

_Results = TypeVar("_Results")
_Sums = TypeVar("_Sums")


def microbatched(function: Callable[[Any], tuple[_Results, _Sums]], images: Any) -> tuple[_Results, _Sums]:
    """`function(images)`, computed for a few images at a time.

    Args:
        function: takes a tree like `images` for some of them; returns results for each image, and sums over them.
        images: a tree of arrays whose first axis is the batch; the first of them is a feature map.
    """
    x = jax.tree.leaves(images)[0]
    count = microbatch_size(x)
    if count == x.shape[0]:
        return function(images)
    microbatches = jax.tree.map(lambda array: array.reshape(-1, count, *array.shape[1:]), images)

    def step(totals: Any, microbatch: Any) -> tuple[Any, Any]:
        results, sums = function(microbatch)
        return jax.tree.map(jnp.add, totals, sums), results

    _, sums = jax.eval_shape(function, jax.tree.map(lambda array: array[0], microbatches))
    zeros = jax.tree.map(lambda total: jnp.zeros(total.shape, total.dtype), sums)
    totals, results = lax.scan(step, *match_varying_axes((zeros, microbatches)))
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), results), totals


def microbatch_size(x: Float[Array, "b h w c"]) -> Any:
    """The largest divisor of the batch whose maps fit into `MICROBATCH_BYTES`, or 1.

    The whole batch if its size is symbolic or 0.
    """
    batch: Any = x.shape[0]
    if not isinstance(batch, int) or batch == 0:
        return batch
    return largest_divisor(batch, MICROBATCH_BYTES // (math.prod(x.shape[1:]) * x.dtype.itemsize))


def saves_hidden_layer(x: Float[Array, "b h w c"]) -> bool:
    """Whether the forward pass saves the MLP's hidden layer for the backward pass."""
    return bool(x.shape[-1] >= SAVE_HIDDEN_CHANNELS)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` up to `limit`, and at least 1."""
    return next((count for count in range(min(limit, number), 0, -1) if number % count == 0), 1)


def dense_kernel_gradient(x: Float[Array, "b h w c"], dy: Float[Array, "b h w d"], dtype: Dtype) -> Float[Array, "c d"]:
    """`x.T @ dy` over all positions, summed in `dtype`, in the order that is fast on a CPU.

    Maps become matrices first, because XLA would transpose maps before it contracts several axes. Transposing the
    narrower matrix is up to twice as fast. The barrier keeps XLA from swapping them back.
    """
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    product = partial(lax.dot_general, dimension_numbers=(((0,), (0,)), ((), ())), preferred_element_type=dtype)
    if x.shape[1] <= dy.shape[1]:
        return product(x, dy)
    transposed: Float[Array, "d c"] = lax.optimization_barrier(product(dy, x))
    return transposed.T

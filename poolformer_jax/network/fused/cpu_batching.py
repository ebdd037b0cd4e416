"""Feature maps of a batch, worked through in parts that stay in a processor's caches.

A CPU computes a block faster than its memory brings the feature maps. A few images at a time are in the caches from the
first pass over them to the last, and every part uses the same few megabytes: memory that a program asks the system for
in every step, as it does for the hidden layers of a whole batch, costs more than the arithmetic on it.

Several CPU devices that share a batch would fetch each other's images for this; training meshes of them are for tests,
and inference keeps each to its own (`cpu_devices.data_parallel`).
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

from poolformer_jax.network.fused.mesh_types import vary_alike

PART_BYTES = 2**20
"""Of a feature map. Its hidden layer is four times as large, and long enough for matrix products at full speed."""

KEPT_CHANNELS = 256
"""From so many on, reading a hidden layer back takes less time than the matrix product that computes it again."""

_Results = TypeVar("_Results")
_Sums = TypeVar("_Sums")


def in_parts(function: Callable[[Any], tuple[_Results, _Sums]], images: Any) -> tuple[_Results, _Sums]:
    """`function(images)`, computed for a few images at a time.

    Args:
        function: from such a tree for some of the images to results by image, and sums over them.
        images: a tree of arrays whose first axis is the batch; the first of them is a feature map.
    """
    x = jax.tree.leaves(images)[0]
    count = images_in_part(x)
    if count == x.shape[0]:
        return function(images)
    parts = jax.tree.map(lambda array: array.reshape(-1, count, *array.shape[1:]), images)

    def step(totals: Any, part: Any) -> tuple[Any, Any]:
        results, sums = function(part)
        return jax.tree.map(jnp.add, totals, sums), results

    _, sums = jax.eval_shape(function, jax.tree.map(lambda array: array[0], parts))
    zeros = jax.tree.map(lambda total: jnp.zeros(total.shape, total.dtype), sums)
    totals, results = lax.scan(step, *vary_alike((zeros, parts)))
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), results), totals


def images_in_part(x: Float[Array, "b h w c"]) -> Any:
    """The largest divisor of the batch whose maps fit into `PART_BYTES`, or 1; all of a batch of unknown size or 0."""
    batch: Any = x.shape[0]
    if not isinstance(batch, int) or batch == 0:
        return batch
    return largest_divisor(batch, PART_BYTES // (math.prod(x.shape[1:]) * x.dtype.itemsize))


def keep_hidden(x: Float[Array, "b h w c"]) -> bool:
    """Whether the backward pass of a branch should find the hidden layer of the forward pass."""
    return bool(x.shape[-1] >= KEPT_CHANNELS)


def largest_divisor(number: int, limit: int) -> int:
    """The largest number up to `limit` that divides `number`, and at least 1."""
    return next((count for count in range(min(limit, number), 0, -1) if number % count == 0), 1)


def kernel_gradient(x: Float[Array, "b h w c"], dy: Float[Array, "b h w d"], dtype: Dtype) -> Float[Array, "c d"]:
    """`x.T @ dy` over all positions, summed in `dtype`, in the order that is fast on a CPU.

    As matrices, because XLA would copy maps into another order before it contracts several axes; and with the narrower
    one transposed, which is up to twice as fast as the wider one. Without the barrier XLA would turn that around again.
    """
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    product = partial(lax.dot_general, dimension_numbers=(((0,), (0,)), ((), ())), preferred_element_type=dtype)
    if x.shape[1] <= dy.shape[1]:
        return product(x, dy)
    transposed: Float[Array, "d c"] = lax.optimization_barrier(product(dy, x))
    return transposed.T

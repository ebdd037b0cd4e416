"""Self-attention of some heads of an image, forward and backward, as TPU kernels that keep the weights in VMEM.

Channels are in the sublanes and positions in the lanes, so a head is whole registers, and the softmax, over the rows of
the transposed scores, adds registers instead of lanes. The backward kernel computes the weights again.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from poolformer_jax.network.fused.cpu_batching import largest_divisor
from poolformer_jax.network.fused.kernels import tpu_tiles

_SCORES = 2**18  # most scores in a tile

_Heads = Float[Array, "b heads d n"]


def fits(positions: int) -> bool:
    """Whether VMEM holds what `backward` needs for one head."""
    return 32 * positions * positions <= tpu_tiles.VMEM_BYTES


def forward(
    maps: tuple[_Heads, _Heads, _Heads], vectors: tuple[()], parameters: tuple[()], *, interpret: bool
) -> tuple[_Heads, tuple[()], tuple[()]]:
    """`value @ softmax(query^T @ key / sqrt(d))^T` for each head.

    Args:
        maps: (query, key, value), bfloat16, [batch, heads, channels of a head, positions].
        vectors: none.
        parameters: none.
        interpret: compute on any platform.
    """

    def compute_tile(query_ref: Any, key_ref: Any, value_ref: Any, y_ref: Any) -> None:
        for head in range(query_ref.shape[1]):
            query, key, value = (ref[0, head] for ref in (query_ref, key_ref, value_ref))
            exponentials, sums = _exponentials(query, key)
            y_ref[0, head] = (_product(value, exponentials.astype(value.dtype), 1, 0) / sums).astype(y_ref.dtype)

    (y,) = _call("attention_forward", compute_tile, maps, results=1, products=2, interpret=interpret)
    return y, (), ()


def backward(
    maps: tuple[_Heads, _Heads, _Heads, _Heads], vectors: tuple[()], parameters: tuple[()], *, interpret: bool
) -> tuple[tuple[_Heads, _Heads, _Heads], tuple[()], tuple[()]]:
    """The gradients of `forward` by query, key and value.

    Args:
        maps: (query, key, value, dy).
        vectors: none.
        parameters: none.
        interpret: as in `forward`.
    """

    def compute_tile(
        query_ref: Any, key_ref: Any, value_ref: Any, dy_ref: Any, dquery_ref: Any, dkey_ref: Any, dvalue_ref: Any
    ) -> None:
        for head in range(query_ref.shape[1]):
            query, key, value, dy = (ref[0, head] for ref in (query_ref, key_ref, value_ref, dy_ref))
            dtype, scale = query.dtype, query.shape[0] ** -0.5
            exponentials, sums = _exponentials(query, key)
            weights = exponentials * (1 / sums)
            weighted = weights * _product(value, dy, 0, 0)
            dscores = (weighted - weights * jnp.sum(weighted, 0, keepdims=True)).astype(dtype)
            dquery_ref[0, head] = (_product(key, dscores, 1, 0) * scale).astype(dtype)
            dkey_ref[0, head] = (_product(query, dscores, 1, 1) * scale).astype(dtype)
            dvalue_ref[0, head] = _product(dy, weights.astype(dtype), 1, 1).astype(dtype)

    dquery, dkey, dvalue = _call("attention_backward", compute_tile, maps, results=3, products=5, interpret=interpret)
    return (dquery, dkey, dvalue), (), ()


def _call(
    name: str, compute_tile: Any, maps: tuple[_Heads, ...], *, results: int, products: int, interpret: bool
) -> tuple[_Heads, ...]:
    batch, heads, head_dim, positions = maps[0].shape
    in_tile = largest_divisor(heads, max(1, _SCORES // positions**2))
    block = pl.BlockSpec((1, in_tile, head_dim, positions), lambda image, head: (image, head, 0, 0))
    outputs = [tpu_tiles.output(maps[0].shape, maps[0].dtype)] * results
    scores = batch * heads * positions**2
    found: tuple[_Heads, ...] = pl.pallas_call(
        compute_tile,
        name=name,
        in_specs=[block] * len(maps),
        out_specs=[block] * results,
        out_shape=outputs,
        interpret=interpret,
        **tpu_tiles.options(
            "parallel",
            "parallel",
            grid=(batch, heads // in_tile),
            flops=2 * products * scores * head_dim,
            transcendentals=scores,
            arrays=[*maps, *outputs],
        ),
    )(*maps)
    return tuple(found)


def _exponentials(
    query: Float[Array, "d n"], key: Float[Array, "d n"]
) -> tuple[Float[Array, "keys queries"], Float[Array, "1 queries"]]:
    """The weights before the softmax divides them, and their sums."""
    scores = _product(key, query, 0, 0)
    # In powers of two the scores' factor costs nothing.
    factor = math.log2(math.e) * query.shape[0] ** -0.5
    exponentials = jnp.exp2((scores - jnp.max(scores, 0, keepdims=True)) * factor)
    return exponentials, jnp.sum(exponentials, 0, keepdims=True)


def _product(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """The sum over one axis of each matrix, in float32."""
    contract = ((left_axis,), (right_axis,)), ((), ())
    product: Array = lax.dot_general(left, right, contract, preferred_element_type=jnp.float32)
    return product

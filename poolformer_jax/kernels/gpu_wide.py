"""The MLP branch of wide stages on NVIDIA GPUs: a kernel in either pass for the hidden layer, the rest by XLA.

With many channels a program cannot hold a row's map, so that the hidden layer has to be written: once in the forward
pass, by the kernel that computes it, activation included; and once in the backward pass, together with its gradient, by
a kernel that computes both from the map and from the branch's gradient. XLA multiplies what these write.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from poolformer_jax.functional import gelu_fit, widen
from poolformer_jax.kernels.devices import GPU_ROWS, side_of_blocks
from poolformer_jax.moments import over_map

_Map = Float[Array, "b h w c"]
_PerImage = Float[Array, " b"]
_Rows = Float[Array, "rows c"]
_Weights = tuple[Float[Array, "c hidden"], Float[Array, " hidden"], Float[Array, "hidden c"], Float[Array, " c"]]


def forward(
    maps: tuple[_Map], vectors: tuple[_PerImage, ...], weights: _Weights, *, interpret: bool
) -> tuple[_Map, tuple[_PerImage, _PerImage], tuple[()]]:
    """As `gpu_narrow.forward`."""
    (x,), (mean, std, keep), (kernel1, bias1, kernel2, bias2) = maps, vectors, weights
    (hidden,) = _through_hidden([_standard(x, mean, std)], kernel1, bias1, [], interpret)
    branch = (jnp.dot(hidden, kernel2) + bias2.astype(x.dtype)).reshape(x.shape)
    y = (widen(x) + widen(branch) * over_map(keep)).astype(x.dtype)
    distance = widen(y) - over_map(mean)
    return y, (distance.sum((1, 2, 3)), (distance * distance).sum((1, 2, 3))), ()


def backward(
    maps: tuple[_Map, _Map, _Map], vectors: tuple[_PerImage, ...], weights: _Weights, *, interpret: bool
) -> tuple[_Map, tuple[_PerImage, _PerImage], _Weights]:
    """As `gpu_narrow.backward`."""
    (x, y, dy), (mean, std, keep, slope, offset) = maps, vectors
    kernel1, bias1, kernel2, _ = weights
    whole = widen(dy) + widen(y) * over_map(slope) + over_map(offset)
    standard, dbranch = _standard(x, mean, std), _flat((whole * over_map(keep)).astype(x.dtype))
    hidden, dinner, dbias1 = _through_hidden([standard, dbranch], kernel1, bias1, [kernel2.T], interpret)

    dstandard = jnp.dot(dinner, kernel1.T, preferred_element_type=jnp.float32).reshape(x.shape)
    dx = (whole + dstandard * over_map(std)).astype(x.dtype)
    products = dstandard * widen(standard).reshape(x.shape)
    dweights = _contract(standard, dinner), dbias1.sum(0), _contract(hidden, dbranch), widen(dbranch).sum(0)
    return dx, (dstandard.sum((1, 2, 3)), products.sum((1, 2, 3))), dweights


def _through_hidden(
    rows: list[_Rows], kernel1: Array, bias1: Array, kernel2t: list[Array], interpret: bool
) -> tuple[Array, ...]:
    """`gelu(z @ kernel1 + bias1)`; and for rows of the branch's gradient, the gradient of what the activation takes.

    A program has a tile of the hidden layer. It goes through the channels of the map a few at a time.

    Args:
        rows: the standardised map, and the branch's gradient.
        kernel1: of the first layer.
        bias1: of the first layer.
        kernel2t: of the second layer, transposed; with the branch's gradient only.
        interpret: compute on any platform.

    Returns:
        The hidden layer; its gradient before the activation, and sums of that over some of the rows.
    """
    (count, channels), hidden = rows[0].shape, kernel1.shape[1]
    # What waits for its product, `side` channels of all blocks in each of the stages, fits into 99 KiB.
    side, stages = (side_of_blocks(channels, 32), 4) if kernel2t else (side_of_blocks(channels), 3)
    columns = side_of_blocks(hidden, 128)
    height = 2 * GPU_ROWS if count % (2 * GPU_ROWS) == 0 else GPU_ROWS
    tiles, dtype = hidden // columns, rows[0].dtype

    def kernel(*refs: Any) -> None:
        lefts, (b1, *rights), results = refs[: len(rows)], refs[len(rows) : -len(shapes)], refs[-len(shapes) :]
        # Neighbours share the rows that they read.
        tile, part = pl.program_id(0) // tiles, pl.program_id(0) % tiles
        where, some = pl.ds(tile * height, height), pl.ds(part * columns, columns)

        def add(index: Any, totals: list[Array]) -> list[Array]:
            block = pl.ds(index * side, side)
            return [
                total + jnp.dot(left[where, block], right[block, some], preferred_element_type=jnp.float32)
                for total, left, right in zip(totals, lefts, rights)
            ]

        zeros = [jnp.zeros((height, columns), jnp.float32) for _ in rows]
        inner, *dhidden = lax.fori_loop(0, channels // side, add, zeros)
        value, rise = gelu_fit(inner + b1[some][None])
        results[0][where, some] = value.astype(dtype)
        for gradient in dhidden:
            dinner = gradient * rise
            results[1][where, some] = dinner.astype(dtype)
            results[2][tile, some] = dinner.sum(0)

    shapes = [jax.ShapeDtypeStruct((count, hidden), dtype)] * len(rows)  # type: ignore[no-untyped-call]
    if kernel2t:
        shapes.append(jax.ShapeDtypeStruct((count // height, hidden), jnp.float32))  # type: ignore[no-untyped-call]
    return tuple(
        pl.pallas_call(
            kernel,
            name="mlp_hidden_gradient" if kernel2t else "mlp_hidden",
            grid=(count // height * tiles,),
            out_shape=shapes,
            interpret=interpret,
            compiler_params=triton.CompilerParams(num_warps=8, num_stages=stages),
        )(*rows, bias1, kernel1, *kernel2t)
    )


def _contract(left: Float[Array, "rows c"], right: Float[Array, "rows d"]) -> Float[Array, "c d"]:
    """`left.T @ right`, summed in float32."""
    return lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _standard(x: _Map, mean: _PerImage, std: _PerImage) -> _Rows:
    return _flat(((widen(x) - over_map(mean)) * over_map(std)).astype(x.dtype))


def _flat(x: _Map) -> _Rows:
    return x.reshape(-1, x.shape[-1])

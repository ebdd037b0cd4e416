"""The MLP branch of wide stages on NVIDIA GPUs: a kernel in each pass computes the hidden layer, XLA the rest.

With many channels a program cannot hold a row of the map, so the hidden layer has to be written. In the forward pass
one kernel computes and writes it, activation included. In the backward pass one kernel computes it from the map, and
its gradient from the branch's, and writes both. XLA computes the products with what the kernels write.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from poolformer_jax.network.functional import gelu_fit, widen
from poolformer_jax.network.fused.kernels.base import GPU_ROWS, block_size
from poolformer_jax.network.fused.statistics import broadcast_over_map

_Map = Float[Array, "b h w c"]
_PerImage = Float[Array, " b"]
_Rows = Float[Array, "rows c"]
_Hidden = Float[Array, "rows hidden"]
_Weights = tuple[Float[Array, "c hidden"], Float[Array, " hidden"], Float[Array, "hidden c"], Float[Array, " c"]]


def forward(
    maps: tuple[_Map], vectors: tuple[_PerImage, ...], weights: _Weights, *, interpret: bool
) -> tuple[_Map, tuple[_PerImage, _PerImage], tuple[()]]:
    """As `gpu_narrow.forward`."""
    (x,), (mean, inverse_std, keep), (kernel1, bias1, kernel2, bias2) = maps, vectors, weights
    hidden = _hidden_layer(_standard(x, mean, inverse_std), kernel1, bias1, interpret)
    branch = (jnp.dot(hidden, kernel2) + bias2.astype(x.dtype)).reshape(x.shape)
    y = (widen(x) + widen(branch) * broadcast_over_map(keep)).astype(x.dtype)
    distance = widen(y) - broadcast_over_map(mean)
    return y, (distance.sum((1, 2, 3)), (distance * distance).sum((1, 2, 3))), ()


def backward(
    maps: tuple[_Map, _Map, _Map], vectors: tuple[_PerImage, ...], weights: _Weights, *, interpret: bool
) -> tuple[_Map, tuple[_PerImage, _PerImage], _Weights]:
    """As `gpu_narrow.backward`."""
    (x, y, dy), (mean, inverse_std, keep, slope, offset) = maps, vectors
    kernel1, bias1, kernel2, _ = weights
    dy = widen(dy) + widen(y) * broadcast_over_map(slope) + broadcast_over_map(offset)
    standard, dbranch = _standard(x, mean, inverse_std), _flat((dy * broadcast_over_map(keep)).astype(x.dtype))
    hidden, dinner, dbias1 = _hidden_gradient(standard, dbranch, kernel1, bias1, kernel2.T, interpret)

    dstandard = jnp.dot(dinner, kernel1.T, preferred_element_type=jnp.float32).reshape(x.shape)
    dx = (dy + dstandard * broadcast_over_map(inverse_std)).astype(x.dtype)
    products = dstandard * widen(standard).reshape(x.shape)
    dweights = _contract(standard, dinner), dbias1, _contract(hidden, dbranch), widen(dbranch).sum(0)
    return dx, (dstandard.sum((1, 2, 3)), products.sum((1, 2, 3))), dweights


def _hidden_layer(
    z: _Rows, kernel1: Float[Array, "c hidden"], bias1: Float[Array, " hidden"], interpret: bool
) -> _Hidden:
    """`gelu(z @ kernel1 + bias1)`."""
    tiles = _Tiles(z, kernel1, block_size(z.shape[1]))

    def kernel(z_ref: Any, w1: Any, b1: Any, hidden_ref: Any) -> None:
        _, rows, columns = tiles.program_slices()
        (inner,) = tiles.products(rows, columns, (z_ref, w1))
        hidden_ref[rows, columns] = gelu_fit(inner + b1[columns][None])[0].astype(hidden_ref.dtype)

    hidden: _Hidden
    (hidden,) = tiles.call(kernel, "mlp_hidden", [z, kernel1, bias1], [tiles.layer], 3, interpret)
    return hidden


def _hidden_gradient(
    z: _Rows,
    dbranch: _Rows,
    kernel1: Float[Array, "c hidden"],
    bias1: Float[Array, " hidden"],
    kernel2t: Float[Array, "c hidden"],
    interpret: bool,
) -> tuple[_Hidden, _Hidden, Float[Array, " hidden"]]:
    """The hidden layer, the gradient before its activation, and the gradient of the first bias.

    Args:
        z: the standardised map.
        dbranch: the gradient of the branch, `hidden @ kernel2`.
        kernel1: of the first layer.
        bias1: of the first layer.
        kernel2t: of the second layer, transposed.
        interpret: compute on any platform.
    """
    # Half the channels of the forward pass at a time: the operands of both products have to fit into 99 KiB.
    tiles = _Tiles(z, kernel1, block_size(z.shape[1], 32))

    def kernel(
        z_ref: Any, dbranch_ref: Any, w1: Any, b1: Any, w2t: Any, hidden_ref: Any, dinner_ref: Any, sum_ref: Any
    ) -> None:
        tile, rows, columns = tiles.program_slices()
        inner, dhidden = tiles.products(rows, columns, (z_ref, w1), (dbranch_ref, w2t))
        hidden, dgelu = gelu_fit(inner + b1[columns][None])
        dinner = dhidden * dgelu
        hidden_ref[rows, columns] = hidden.astype(hidden_ref.dtype)
        dinner_ref[rows, columns] = dinner.astype(dinner_ref.dtype)
        sum_ref[tile, columns] = dinner.sum(0)

    arrays, results = [z, dbranch, kernel1, bias1, kernel2t], [tiles.layer, tiles.layer, tiles.sums]
    hidden, dinner, sums = tiles.call(kernel, "mlp_hidden_gradient", arrays, results, 4, interpret)
    return hidden, dinner, sums.sum(0)


class _Tiles:
    """A hidden layer [rows, hidden] in tiles, one per program, which sums over the map's channels block by block."""

    def __init__(self, z: _Rows, kernel1: Float[Array, "c hidden"], side: int) -> None:
        rows, hidden = len(z), kernel1.shape[1]
        self.height = 2 * GPU_ROWS if rows % (2 * GPU_ROWS) == 0 else GPU_ROWS
        self.width = block_size(hidden, 128)
        self.down, self.across = rows // self.height, hidden // self.width
        self.side, self.blocks = side, kernel1.shape[0] // side
        self.layer = jax.ShapeDtypeStruct((rows, hidden), z.dtype)
        self.sums = jax.ShapeDtypeStruct((self.down, hidden), jnp.float32)

    def program_slices(self) -> tuple[Any, Any, Any]:
        """The program's row of tiles, and the slices of its tile. Neighbouring programs read the same rows."""
        tile, part = pl.program_id(0) // self.across, pl.program_id(0) % self.across
        return tile, pl.ds(tile * self.height, self.height), pl.ds(part * self.width, self.width)

    def products(self, rows: Any, columns: Any, *factors: tuple[Any, Any]) -> list[Array]:
        """`left[rows] @ right[:, columns]` for each pair of factors, in float32."""

        def add(index: Any, totals: list[Array]) -> list[Array]:
            block = pl.ds(index * self.side, self.side)
            return [
                total + jnp.dot(left[rows, block], right[block, columns], preferred_element_type=jnp.float32)
                for total, (left, right) in zip(totals, factors)
            ]

        zeros = [jnp.zeros((self.height, self.width), jnp.float32) for _ in factors]
        totals: list[Array] = lax.fori_loop(0, self.blocks, add, zeros)
        return totals

    def call(
        self, kernel: Any, name: str, arrays: list[Array], results: list[Any], num_stages: int, interpret: bool
    ) -> Any:
        """Launches `kernel` with `num_stages` pipelined loads."""
        return pl.pallas_call(
            kernel,
            name=name,
            grid=(self.down * self.across,),
            out_shape=results,
            interpret=interpret,
            compiler_params=triton.CompilerParams(num_warps=8, num_stages=num_stages),
        )(*arrays)


def _contract(left: Float[Array, "rows c"], right: Float[Array, "rows d"]) -> Float[Array, "c d"]:
    """`left.T @ right`, summed in float32."""
    return lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _standard(x: _Map, mean: _PerImage, inverse_std: _PerImage) -> _Rows:
    return _flat(((widen(x) - broadcast_over_map(mean)) * broadcast_over_map(inverse_std)).astype(x.dtype))


def _flat(x: _Map) -> _Rows:
    return x.reshape(-1, x.shape[-1])

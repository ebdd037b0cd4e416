"""The MLP branch of narrow stages on NVIDIA GPUs, in one kernel.

A program holds some rows of the map [positions, channels], computes the hidden layer a few channels at a time, and
writes no part of it. The sides of blocks are powers of two: 96 channels are three blocks of 32.
"""

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from poolformer_jax.network.functional import gelu_fit
from poolformer_jax.network.fused.kernels.base import GPU_ROWS, block_size

_Map = Float[Array, "b h w c"]
_PerImage = Float[Array, " b"]
_Weights = tuple[Float[Array, "c hidden"], Float[Array, " hidden"], Float[Array, "hidden c"], Float[Array, " c"]]


def forward(
    maps: tuple[_Map], vectors: tuple[_PerImage, ...], weights: _Weights, *, interpret: bool
) -> tuple[_Map, tuple[_PerImage, _PerImage], tuple[()]]:
    """The branch with its input, `y = x + keep * mlp((x - mean) * inverse_std)`.

    Args:
        maps: (x), bfloat16, [batch, height, width, channels].
        vectors: (mean, inverse_std, keep); keep is the branch's factor.
        weights: kernel1 and kernel2 in bfloat16, bias1 and bias2 in float32.
        interpret: compute on any platform.

    Returns:
        `y`, and the sums of `y - mean` and of its square over each image.
    """
    (x,), blocks = maps, _Blocks(maps[0], weights[0])

    def kernel(
        x_ref: Any, mean_ref: Any, inverse_std_ref: Any, keep_ref: Any, w1: Any, b1: Any, w2: Any, b2: Any,
        y_ref: Any, sum_ref: Any, square_ref: Any,
    ) -> None:  # fmt: skip
        rows = pl.ds(pl.program_id(0) * GPU_ROWS, GPU_ROWS)
        mean, inverse_std, keep = blocks.gather(rows, mean_ref, inverse_std_ref, keep_ref)
        standard = [_standard(x, mean, inverse_std) for x in blocks.read(x_ref, rows)]

        def add(index: Any, branch: list[Array]) -> list[Array]:
            hidden_slice = blocks.hidden(index)
            hidden = gelu_fit(blocks.product(standard, w1, hidden_slice) + b1[hidden_slice][None])[0].astype(
                x_ref.dtype
            )
            return [
                total + _product(hidden, w2[hidden_slice, channel_slice])
                for total, channel_slice in zip(branch, blocks.channels)
            ]

        branch = lax.fori_loop(0, blocks.parts, add, blocks.zeros())
        total = squares = jnp.zeros(GPU_ROWS, jnp.float32)
        for channel_slice, x, block in zip(blocks.channels, blocks.read(x_ref, rows), branch):
            y = (x + (block + b2[channel_slice][None]) * keep).astype(y_ref.dtype)
            y_ref[rows, channel_slice] = y
            distance = y.astype(jnp.float32) - mean
            total, squares = total + distance.sum(1), squares + (distance * distance).sum(1)
        sum_ref[rows], square_ref[rows] = total, squares

    y, total, squares = blocks.call(
        kernel,
        "mlp_forward",
        blocks.rows // GPU_ROWS,
        [blocks.flat(x), *vectors, *weights],
        [blocks.map_like, *[blocks.vector] * 2],
        interpret,
    )
    return y.reshape(x.shape), (blocks.by_image(total), blocks.by_image(squares)), ()


class _Blocks:
    """A map as [rows, channels], one row per position of an image, in blocks; and the blocks of a hidden layer."""

    def __init__(self, x: _Map, kernel1: Float[Array, "c hidden"]) -> None:
        self.images, self.width = x.shape[0], x.shape[3]
        self.rows, self.positions = math.prod(x.shape[:3]), x.shape[1] * x.shape[2]
        self.side, self.hidden_side = (block_size(channels) for channels in kernel1.shape)
        self.parts = kernel1.shape[1] // self.hidden_side
        self.channels = [pl.ds(start, self.side) for start in range(0, self.width, self.side)]
        self.map_like, self.vector = self.array(self.rows, self.width, dtype=x.dtype), self.array(self.rows)

    def flat(self, x: _Map) -> Float[Array, "rows c"]:
        return x.reshape(-1, self.width)

    def by_image(self, sums: Float[Array, " rows"]) -> _PerImage:
        return sums.reshape(self.images, -1).sum(1)

    def hidden(self, part: Any) -> Any:
        """The slice of a part of the hidden layer."""
        return pl.ds(part * self.hidden_side, self.hidden_side)

    def array(self, *shape: int, dtype: Dtype = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def zeros(self) -> list[Array]:
        return [jnp.zeros((GPU_ROWS, self.side), jnp.float32) for _ in self.channels]

    def gather(self, rows: Any, *refs: Any) -> list[Float[Array, "rows 1"]]:
        """For each row, the values that its image has in `refs`."""
        image = (rows.start + jnp.arange(GPU_ROWS)) // self.positions
        return [ref[image][:, None] for ref in refs]

    def read(self, ref: Any, rows: Any) -> list[Array]:
        """Some rows in float32, block by block."""
        return [ref[rows, channel_slice].astype(jnp.float32) for channel_slice in self.channels]

    def product(self, left: list[Array], right: Any, columns: Any) -> Array:
        """`left @ right[:, columns]`, in float32."""
        products = [_product(block, right[channel_slice, columns]) for block, channel_slice in zip(left, self.channels)]
        return functools.reduce(operator.add, products)

    def call(
        self, kernel: Any, name: str, programs: int, arrays: list[Array], results: list[Any], interpret: bool
    ) -> Any:
        return pl.pallas_call(
            kernel,
            name=name,
            grid=(programs,),
            out_shape=results,
            interpret=interpret,
            # Enough threads to hold the sums of 64 rows in their registers.
            compiler_params=triton.CompilerParams(num_warps=4 if self.width <= 64 else 8, num_stages=2),
        )(*arrays)


def _standard(x: Array, mean: Array, inverse_std: Array) -> Array:
    return ((x - mean) * inverse_std).astype(jnp.bfloat16)


def _product(left: Array, right: Array) -> Array:
    return jnp.dot(left, right, preferred_element_type=jnp.float32)

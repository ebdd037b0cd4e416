"""How TPU kernels run over the rows of feature maps, and what several of them compute of a row.

A row is the channels of one position of one image. A tile holds some positions of some images, so that their hidden
layer fits into VMEM. The kernels of the second paper's blocks are such kernels, except for the depthwise convolution
and attention. Each has a `forward` and a `backward` with the same arguments:

  maps        bfloat16, [height, width, batch, channels]; `backward` also takes the gradients of the results
  vectors     a number for each image, such as drop path's factor
  parameters  matrices in bfloat16, vectors and a norm's epsilon in float32
  interpret   compute on any platform

They return a map, nothing for each image, and `backward` the gradients by the parameters but epsilon, in float32.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from poolformer_jax.network.fused.cpu_batching import largest_divisor
from poolformer_jax.network.fused.kernels import tpu_tiles
from poolformer_jax.network.fused.kernels.base import TPU_IMAGES
from poolformer_jax.network.fused.kernels.tpu_tiles import SUBLANES

_HIDDEN_NUMBERS = 2**18  # most numbers of the hidden layer in a tile
_ROWS = 1024


def fits(channels: int, hidden_features: int) -> bool:
    """Whether VMEM holds what `tpu_norm_mlp.backward` needs: matrices and gradients, two copies each, and a tile."""
    rows = max(_HIDDEN_NUMBERS // hidden_features, TPU_IMAGES)
    matrices = 2 * 2 * channels * hidden_features * (2 + 4)
    return matrices + rows * (16 * hidden_features + 44 * channels) <= tpu_tiles.VMEM_BYTES


def call(
    name: str,
    compute_tile: Callable[..., None],
    maps: Sequence[Float[Array, "h w b _"]],
    vectors: Sequence[Float[Array, " b"]],
    parameters: Sequence[Array],
    *,
    channels: int,
    backward: bool = False,
    flops: int,
    interpret: bool,
) -> tuple[Any, tuple[()], Any]:
    """Calls a kernel that computes a map; in a backward pass also sums over all rows, the parameters' gradients.

    Args:
        name: the kernel's.
        compute_tile: the kernel: a function of references to a tile of each map, [positions, images, channels]; of each
            vector, [images, 1]; to the parameters, with two axes each; and to the results. Sums start at zero; the
            kernel adds a vector's as `tpu_tiles.sum_to_register`.
        maps: as the module says.
        vectors: as the module says.
        parameters: as the module says. A scalar is in SMEM, because it would fill registers elsewhere. A backward
            kernel does not get the last one, which is only added to a result.
        channels: of the map that is returned.
        backward: whether it is a backward pass.
        flops: of the whole call.
        interpret: as the module says.
    """
    gradients = [parameter.shape for parameter in parameters if backward and parameter.ndim]
    hidden_features = max(z.shape[-1] for z in (*maps, *parameters) if z.ndim)
    if backward:
        parameters = parameters[:-1]
    height, width, batch, _ = maps[0].shape
    most_rows = min(_ROWS, _HIDDEN_NUMBERS // hidden_features)
    images = tpu_tiles.images_in_tile(batch, max(TPU_IMAGES, min(most_rows, 64)))
    positions = largest_divisor(height * width, max(1, most_rows // images))

    def tile_of(channels: int) -> pl.BlockSpec:
        return pl.BlockSpec((positions, images, channels), lambda image, position: (position, image, 0))

    def kernel(*refs: Any) -> None:
        if gradients:
            first = (pl.program_id(0) == 0) & (pl.program_id(1) == 0)
            tpu_tiles.zero_if(first, *refs[-len(gradients) :])
        compute_tile(*refs)

    column = pl.BlockSpec((images, 1), lambda image, position: (image, 0))
    matrices = [jnp.atleast_2d(parameter) for parameter in parameters]
    sums = [tpu_tiles.output((SUBLANES, *shape) if len(shape) == 1 else shape) for shape in gradients]
    outputs = [tpu_tiles.output((height * width, batch, channels), maps[0].dtype), *sums]
    y, *totals = pl.pallas_call(
        kernel,
        name=name,
        in_specs=[
            *(tile_of(z.shape[3]) for z in maps),
            *[column] * len(vectors),
            *(
                tpu_tiles.whole(m) if p.ndim else pl.BlockSpec(memory_space=pltpu.SMEM)
                for p, m in zip(parameters, matrices)
            ),
        ],
        out_specs=[tile_of(channels), *map(tpu_tiles.whole, sums)],
        out_shape=outputs,
        interpret=interpret,
        **tpu_tiles.options(
            *("arbitrary" if gradients else "parallel",) * 2,
            grid=(batch // images, height * width // positions),
            flops=flops,
            arrays=[*maps, *matrices, *outputs],
        ),
    )(*map(tpu_tiles.by_position, maps), *(vector[:, None] for vector in vectors), *matrices)
    totals = [total.sum(0) if len(shape) == 1 else total for total, shape in zip(totals, gradients)]
    return y.reshape(height, width, batch, channels), (), tuple(totals)


def standardize(x: Float[Array, "rows c"], epsilon: Array) -> tuple[Float[Array, "rows c"], Float[Array, "rows 1"]]:
    """`(x - mean) / std` of each row, and 1 / std."""
    distance = x - _mean(x)
    inverse_std = lax.rsqrt(_mean(distance * distance) + epsilon)
    return distance * inverse_std, inverse_std


def standardize_gradient(
    standard: Float[Array, "rows c"], inverse_std: Float[Array, "rows 1"], dstandard: Float[Array, "rows c"]
) -> Float[Array, "rows c"]:
    """The gradient of `standardize` by its input, from its results and the gradient of the first."""
    return (dstandard - _mean(dstandard) - standard * _mean(dstandard * standard)) * inverse_std


def _mean(x: Float[Array, "rows c"]) -> Float[Array, "rows 1"]:
    return jnp.mean(x, 1, keepdims=True)

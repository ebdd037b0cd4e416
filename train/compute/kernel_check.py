"""Whether the Pallas kernels compute on these devices what XLA computes there.

Both are in bfloat16, so they differ by its rounding, a few percent at most. A kernel that is wrong, or was compiled
wrongly, is off by as much as its result.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from poolformer_jax import PoolFormerConfig
from poolformer_jax.network import functional
from poolformer_jax.network.fused import block
from poolformer_jax.network.fused.kernels import GPU_ROWS, TPU_IMAGES, Kernels, Pass
from poolformer_jax.network.fused.statistics import Moments, moments_of
from train.compute.sharding import batch_sharding, replicated

TOLERANCE = 0.1
_COSTLIEST: Pass = "mlp_gradient"  # of a block's passes; both kinds of kernels have it


def largest_difference(config: PoolFormerConfig, image_size: int, mesh: Mesh, kernels: Kernels) -> tuple[float, str]:
    """How far the results and gradients of a block are apart with and without kernels, in any stage.

    Args:
        config: the network.
        image_size: pixels along height and width.
        mesh: devices that share the batch, as many images on each as every kernel takes.
        kernels: on that mesh.

    Returns:
        The largest distance, relative to the result, and whose it is; infinite where a result is not finite.
    """
    found = []
    for index, (size, channels) in enumerate(zip(config.feature_sizes(image_size), config.hidden_sizes)):
        arguments = _noise(_images(size) * mesh.devices.size, size, channels, config.mlp_hidden_sizes[index], mesh)
        ours, plain = (jax.jit(partial(_results, kernels=k))(*arguments) for k in (kernels, None))
        for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(plain)):
            name = f"stage {index}'s {jax.tree_util.keystr(path, simple=True, separator=' ')}"
            found.append((float(np.nan_to_num(_distance(a, b), nan=np.inf)), name))
    return max(found)


def stages_lost(config: PoolFormerConfig, image_size: int, images: int, mesh: Mesh, kernels: Kernels) -> list[int]:
    """The stages whose MLPs kernels take of other numbers of images, and not of `images` at a time on all devices."""

    def takes(index: int, size: int, count: int) -> bool:
        found = []

        def look(x: jax.Array) -> None:
            found.append(kernels.supports(_COSTLIEST, x, config.mlp_hidden_sizes[index]))

        shape = (count, size, size, config.hidden_sizes[index])
        jax.eval_shape(look, jax.ShapeDtypeStruct(shape, jnp.bfloat16))
        return found[0]

    return [
        index
        for index, size in enumerate(config.feature_sizes(image_size))
        if takes(index, size, _images(size) * mesh.devices.size) and not takes(index, size, images)
    ]


def _images(size: int) -> int:
    """As few as fill both the registers of a TPU and the largest tiles of a GPU's kernels."""
    return math.lcm(TPU_IMAGES * size**2, 2 * GPU_ROWS) // size**2


def _noise(images: int, size: int, channels: int, hidden: int, mesh: Mesh) -> tuple[Any, ...]:
    """A map, what is learnt, drop path's factor, and the gradients of a block's results."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    pixels = (images, size, size, channels)
    weights: Any = (
        normal(channels, hidden) / channels**0.5,
        normal(hidden),
        normal(hidden, channels) / hidden**0.5,
        normal(channels),
    )
    keep = rng.choice([0, 1.25], images).astype(np.float32)
    x, dy = (normal(*pixels).astype(jnp.bfloat16) for _ in range(2))
    cut = x, keep, dy, normal(images), normal(images)
    x, keep, dy, dmean, dvariance = jax.device_put(cut, batch_sharding(mesh))
    gain, weights = jax.device_put((normal(channels), block.MlpWeights(*weights)), replicated(mesh))
    return x, gain, weights, keep, (dy, Moments(dmean, dvariance))


def _results(
    x: jax.Array, gain: jax.Array, weights: Any, keep: jax.Array, cotangents: Any, kernels: Kernels | None
) -> dict[str, Any]:
    def both_branches(x: jax.Array, gain: jax.Array, weights: Any) -> Any:
        y, moments = block.pooling_residual(3, x, moments_of(x), gain, keep, kernels)
        return block.mlp_residual(functional.gelu, y, moments, weights, keep, kernels)

    (y, moments), vjp = jax.vjp(both_branches, x, gain, weights)
    dx, dgain, dweights = vjp(cotangents)
    return {"map": y, "moments": moments, "gradient of": {"x": dx, "gain": dgain, "mlp": dweights}}


@jax.jit
def _distance(found: jax.Array, exact: jax.Array) -> jax.Array:
    found, exact = (z.astype(jnp.float32) for z in (found, exact))
    return jnp.linalg.norm((found - exact).ravel()) / jnp.linalg.norm(exact.ravel())

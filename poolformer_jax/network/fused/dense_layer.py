"""A dense layer whose gradient by the kernel is in the order that is fast on a CPU.

On other platforms it is `functional.dense` with its gradients.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from poolformer_jax.network.functional import over_channels
from poolformer_jax.network.fused.cpu_batching import dense_kernel_gradient
from poolformer_jax.network.fused.sharding_types import partition_spec, with_auto_sharding

_Map = Float[Array, "b h w c"]
_Output = Float[Array, "b h w d"]
_Kernel = Float[Array, "c d"]


def dense(x: _Map, kernel: _Kernel, bias: Float[Array, " d"] | None = None) -> _Output:
    """`functional.dense` of a feature map, which also has a forward-mode derivative; this has none."""
    y = with_auto_sharding(_product, x, kernel.astype(x.dtype), specs=PartitionSpec(*partition_spec(x)))
    return y if bias is None else y + over_channels(bias, y)


@jax.custom_vjp
def _product(x: _Map, kernel: _Kernel) -> _Output:
    return x @ kernel


def _forward(x: _Map, kernel: _Kernel) -> tuple[_Output, tuple[_Map, _Kernel]]:
    return _product(x, kernel), (x, kernel)


def _backward(residuals: tuple[_Map, _Kernel], dy: _Output) -> tuple[_Map, _Kernel]:
    x, kernel = residuals
    contract = partial(jnp.einsum, "bhwc,bhwd->cd")
    dkernel: Array = lax.platform_dependent(
        x, dy, cpu=partial(dense_kernel_gradient, dtype=kernel.dtype), default=contract
    )
    return dy @ kernel.T, dkernel


_product.defvjp(_forward, _backward)

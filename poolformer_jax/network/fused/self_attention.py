"""Self-attention of a feature map, on TPUs by kernels, or in fewer passes than `functional.attention`.

The weights are divided by their sums after the product with the values, so XLA fuses the scores with their maximum,
exponentials and sums. The gradient of the scores is one pass, too: the maps of [positions, positions] are most of
attention's memory traffic. Query, key and value are separate products, because XLA copies slices of a common one.

Kernels never write these maps. They take queries, keys and values with the positions last.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from poolformer_jax.network import functional
from poolformer_jax.network.functional import widen
from poolformer_jax.network.fused.dense_layer import dense
from poolformer_jax.network.fused.kernel_pass import KernelPass, run
from poolformer_jax.network.fused.kernels.base import Kernels
from poolformer_jax.network.fused.sharding_types import partition_spec, with_auto_sharding

_Map = Float[Array, "b h w c"]
_Heads = Float[Array, "b n heads d"]
_PositionsLast = Float[Array, "b heads d n"]
_Weights = Float[Array, "b heads n n"]
_Sums = Float[Array, "b heads n"]


def self_attention(x: _Map, kernel: Float[Array, "c c3"], head_dim: int, kernels: Kernels | None = None) -> _Map:
    """`functional.attention` of `x @ kernel`. It has no forward-mode derivative.

    Args:
        x: feature maps.
        kernel: of queries, keys and values, each head by head.
        head_dim: channels of a head.
        kernels: used if they support the map, on their platform.
    """
    on_tpu, on_others = partial(attend_on_tpu, head_dim=head_dim), partial(attend_plainly, head_dim=head_dim)
    attend = partial(lax.platform_dependent, tpu=on_tpu, default=on_others)
    batch, height, width, _ = x.shape
    heads = batch, kernel.shape[1] // 3 // head_dim, head_dim, height * width
    if kernels is not None and kernels.supports("attention", heads, x.dtype, None):
        by_kernel = partial(attend_by_kernel, head_dim=head_dim, kernels=kernels)
        attend = by_kernel if kernels.interpret else partial(lax.platform_dependent, tpu=by_kernel, default=on_others)
    y: Array = with_auto_sharding(attend, x, kernel, specs=PartitionSpec(*partition_spec(x)))
    return y


def attend_plainly(x: _Map, kernel: Float[Array, "c c3"], head_dim: int) -> _Map:
    """`self_attention` as other platforms compute it."""
    return functional.attention(dense(x, kernel), head_dim)


def attend_on_tpu(x: _Map, kernel: Float[Array, "c c3"], head_dim: int) -> _Map:
    """`self_attention` in the passes for TPUs."""
    batch, height, width, channels = x.shape
    # XLA fuses products of tokens with what follows, but not products of maps.
    tokens = x.reshape(batch, height * width, channels)
    heads = (
        functional.dense(tokens, part).reshape(batch, height * width, -1, head_dim)
        for part in jnp.split(kernel, 3, axis=1)
    )
    return _attend(*heads).reshape(batch, height, width, -1)


def attend_by_kernel(x: _Map, kernel: Float[Array, "c c3"], head_dim: int, kernels: Kernels | None) -> _Map:
    """`self_attention` in the order that kernels take."""
    batch, height, width, channels = x.shape
    tokens = x.reshape(batch, height * width, channels)
    heads = (
        jnp.einsum("bnc,chd->bhdn", tokens, part.reshape(channels, -1, head_dim).astype(x.dtype))
        for part in jnp.split(kernel, 3, axis=1)
    )
    mixed = attend_heads(kernels, *heads).reshape(batch, -1, height * width)
    return mixed.swapaxes(1, 2).reshape(batch, height, width, -1)


def attend_heads(
    kernels: Kernels | None, query: _PositionsLast, key: _PositionsLast, value: _PositionsLast
) -> _PositionsLast:
    """`value @ softmax(query^T @ key / sqrt(d))^T` for each head; `kernels` compute it on their platform."""
    this = KernelPass("attention", "attention_gradient", _attend_heads)
    y: Array = run(this, kernels, (query, key, value), (), ())
    return y


def _attend_heads(query: _PositionsLast, key: _PositionsLast, value: _PositionsLast) -> _PositionsLast:
    scores = jnp.einsum("bhdq,bhdk->bhqk", query * query.shape[2] ** -0.5, key)
    weights = jax.nn.softmax(widen(scores)).astype(value.dtype)
    return jnp.einsum("bhqk,bhdk->bhdq", weights, value)


@jax.custom_vjp
def _attend(query: _Heads, key: _Heads, value: _Heads) -> _Heads:
    return _forward(query, key, value)[0]


def _forward(query: _Heads, key: _Heads, value: _Heads) -> tuple[_Heads, tuple[Array, ...]]:
    query = query * query.shape[-1] ** -0.5
    wide = widen(query).dtype
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=wide)
    exponentials = jnp.exp(scores - jnp.max(scores, -1, keepdims=True))
    sums, exponentials = jnp.sum(exponentials, -1), exponentials.astype(query.dtype)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", exponentials, value, preferred_element_type=wide)
    mixed = (mixed / _by_position(sums)).astype(query.dtype)
    return mixed, (query, key, value, exponentials, sums, mixed)


def _backward(
    residuals: tuple[_Heads, _Heads, _Heads, _Weights, _Sums, _Heads], dmixed: _Heads
) -> tuple[_Heads, _Heads, _Heads]:
    query, key, value, exponentials, sums, mixed = residuals
    scaled = widen(dmixed) / _by_position(sums)
    # The softmax subtracts the mean gradient of a position's weights.
    mean = jnp.sum(scaled * widen(mixed), -1).swapaxes(1, 2)[..., None]
    scaled = scaled.astype(query.dtype)
    dweights = jnp.einsum("bqhd,bkhd->bhqk", scaled, value, preferred_element_type=widen(value).dtype)
    # Without the barrier, XLA writes the scores' gradient once for each of its two uses.
    dscores = lax.optimization_barrier((widen(exponentials) * (dweights - mean)).astype(query.dtype))
    dquery = jnp.einsum("bhqk,bkhd->bqhd", dscores, key) * query.shape[-1] ** -0.5
    dkey = jnp.einsum("bhqk,bqhd->bkhd", dscores, query)
    return dquery, dkey, jnp.einsum("bhqk,bqhd->bkhd", exponentials, scaled)


def _by_position(sums: _Sums) -> Float[Array, "b n heads 1"]:
    return sums.swapaxes(1, 2)[..., None]


_attend.defvjp(_forward, _backward)

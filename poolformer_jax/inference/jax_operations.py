"""The folded network as JAX computes it: `description` over arrays [batch, height, width, channels].

Feature maps have the type of the pixels. Statistics, softmax and the head use at least float32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Float

from poolformer_jax.inference.description import Operations, Parameters, classify, feature_maps
from poolformer_jax.network import (
    ACTIVATIONS,
    Pixels,
    PoolFormerConfig,
    attention,
    check_pixel_values,
    dense,
    distance_and_inverse_std,
    mix_positions,
    over_channels,
    pooling_mixer,
    standardize,
    widen,
)
from poolformer_jax.network.fused import convolve_depthwise, largest_divisor


def folded_apply(
    config: PoolFormerConfig,
    folded: Parameters,
    pixel_values: Pixels,
    dtype: Dtype = jnp.float32,
    *,
    images_at_once: int | None = None,
) -> Float[Array, "b labels"]:
    """The logits of `MetaFormerForImageClassification(config, dtype)` with train=False, in float32.

    Args:
        config: the architecture.
        folded: what `folding.fold` returns.
        pixel_values: [batch, height, width, num_channels], normalised.
        dtype: type that feature maps are computed in; the statistics and the head always use float32.
        images_at_once: the largest number of images to compute at a time, in equal parts of the batch; None computes
            all at once. `program.images_at_once(config, mesh)` is the fastest number.
    """
    if images_at_once is not None and len(pixel_values) > images_at_once:
        logits: Float[Array, "b labels"]
        logits = in_parts(partial(folded_apply, config, folded, dtype=dtype), pixel_values, images_at_once)
        return logits
    return folded_head(config, folded, folded_features(config, folded, pixel_values, dtype)[-1])


def in_parts(function: Callable[[Array], Any], pixel_values: Pixels, images_at_once: int) -> Any:
    """`function(pixel_values)` for equal parts of the batch, of at most `images_at_once` images."""
    size = largest_divisor(len(pixel_values), images_at_once)
    parts = jnp.reshape(pixel_values, (-1, size, *pixel_values.shape[1:]))
    return jax.tree.map(lambda rows: rows.reshape(-1, *rows.shape[2:]), lax.map(function, parts))


def folded_features(
    config: PoolFormerConfig, folded: Parameters, pixel_values: Pixels, dtype: Dtype = jnp.float32
) -> tuple[Float[Array, "b _h _w _c"], ...]:
    """The feature map of every stage: the `hidden_states` of the model. The arguments are those of `folded_apply`.

    Raises ValueError for pixels that the model does not take.
    """
    check_pixel_values(config, pixel_values.shape, pixel_values.dtype)
    return feature_maps(JaxOperations(), config, folded, jnp.asarray(pixel_values).astype(dtype))


def folded_head(
    config: PoolFormerConfig, folded: Parameters, features: Float[Array, "b h w c"]
) -> Float[Array, "b labels"]:
    """The logits for the last feature map; with num_labels=0 the pooled, normalised features."""
    return classify(JaxOperations(), config, folded, features)


class JaxOperations(Operations[Array]):
    """Values are feature maps [batch, height, width, channels] and vectors [batch, channels]."""

    def at(self, place: str) -> "JaxOperations":
        return self

    def convolution(
        self, x: Float[Array, "b h w c"], params: Parameters, stride: int, padding: int
    ) -> Float[Array, "b h2 w2 d"]:
        kernel = params["kernel"].astype(x.dtype)
        convolution = partial(
            lax.conv_general_dilated,
            window_strides=(stride, stride),
            padding=[(padding, padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        positions: Any = x.shape[0] * x.shape[1] * x.shape[2] // stride**2  # roughly; Any: a symbolic batch
        if isinstance(positions, int) and positions < kernel.shape[-1]:
            product = partial(_convolve_patches, stride=stride, padding=padding)
            y: Array = lax.platform_dependent(x, kernel, cpu=product, default=convolution)
        else:
            y = convolution(x, kernel)
        return y + over_channels(params["bias"], y)

    def dense(self, x: Float[Array, "*b c"], params: Parameters) -> Float[Array, "*b d"]:
        return dense(x, **params)

    def elementwise(self, x: Float[Array, "*b c"], function: str) -> Float[Array, "*b c"]:
        return ACTIVATIONS[function](x)

    def add(self, x: Float[Array, "*b c"], y: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        return x + y

    def multiply(self, x: Float[Array, "*b c"], y: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        return x * y

    def add_embedding(self, x: Float[Array, "b h w c"], embedding: Float[Array, "h w c"]) -> Float[Array, "b h w c"]:
        return x + embedding[None].astype(x.dtype)

    def affine(self, x: Float[Array, "*b c"], scale: Any, shift: Any = None) -> Float[Array, "*b c"]:
        scaled = x * over_channels(scale, x)
        return scaled if shift is None else scaled + over_channels(shift, x)

    def standardize(self, x: Float[Array, "*b c"], norm: str, epsilon: float) -> Float[Array, "*b c"]:
        return standardize(x, (1, 2, 3) if norm == "group_norm" else (-1,), epsilon)

    def mean(self, x: Float[Array, "b h w c"]) -> Float[Array, "b c"]:
        return widen(x).mean((1, 2))

    def standardized_mean(self, x: Float[Array, "b h w c"], norm: str, epsilon: float) -> Float[Array, "b c"]:
        x = widen(x)
        if norm != "group_norm":
            return self.standardize(x, norm, epsilon).mean((1, 2))
        _, inverse_std = distance_and_inverse_std(x, (1, 2, 3), epsilon)  # line 8 of `folding`
        return (x.mean((1, 2)) - x.mean((1, 2, 3))[:, None]) * inverse_std[:, 0, 0]

    def pooling(self, x: Float[Array, "b h w c"], pool_size: int) -> Float[Array, "b h w c"]:
        return pooling_mixer(x, pool_size)

    def pooling_residual(
        self,
        x: Float[Array, "b h w c"],
        pool_size: int,
        scale: Float[Array, " c"],
        epsilon: float,
        trunk: Float[Array, " c"] | None = None,
    ) -> Float[Array, "b h w c"]:
        _, inverse_std = distance_and_inverse_std(x, (1, 2, 3), epsilon)
        scale = over_channels(scale, inverse_std)
        branch = pooling_mixer(x, pool_size) * (inverse_std * scale).astype(x.dtype)
        return (x if trunk is None else x * over_channels(trunk, x)) + branch

    def depthwise_convolution(
        self, x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"]
    ) -> Float[Array, "b h w c"]:
        return convolve_depthwise(x, kernel)

    def attention(self, qkv: Float[Array, "b h w c3"], head_dim: int) -> Float[Array, "b h w c"]:
        on_cpu, on_others = partial(_attend_on_cpu, head_dim=head_dim), partial(attention, head_dim=head_dim)
        y: Array = lax.platform_dependent(qkv, cpu=on_cpu, default=on_others)
        return y

    def mix_positions(self, x: Float[Array, "b h w c"], kernel: Float[Array, "n n"]) -> Float[Array, "b h w c"]:
        return mix_positions(x, kernel)


def _convolve_patches(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k c d"], stride: int, padding: int
) -> Float[Array, "b h2 w2 d"]:
    """A convolution as one matrix product: on a CPU faster than XLA's for fewer positions than channels."""
    size = len(kernel)
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows, columns = (length - size + 1 for length in x.shape[1:3])
    pixels = [x[:, i : i + rows : stride, j : j + columns : stride] for i in range(size) for j in range(size)]
    return jnp.concatenate(pixels, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def _attend_on_cpu(qkv: Float[Array, "b h w c3"], head_dim: int) -> Float[Array, "b h w c"]:
    """`attention` in fewer passes: the sums divide the product with the values instead of the weights."""
    batch, height, width, channels = qkv.shape
    heads = qkv.reshape(batch, height * width, 3, channels // 3 // head_dim, head_dim)
    query, key, value = jnp.moveaxis(heads, (2, 3), (0, 2))  # each [b, heads, h * w, head_dim]
    scores = widen(jnp.einsum("bhqd,bhkd->bhqk", query * head_dim**-0.5, key))
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    mixed = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(qkv.dtype), value)
    mixed = (mixed / weights.sum(-1, keepdims=True)).astype(qkv.dtype)
    return jnp.moveaxis(mixed, 1, 2).reshape(batch, height, width, channels // 3)

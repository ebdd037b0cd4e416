"""The arithmetic of MetaFormers as pure functions of NHWC arrays.

Tests compare everything here with PyTorch's float64 results, because each operation has a similar variant that computes
something else. Sources: arXiv 2111.11418, Section 3; sail-sg/poolformer, models/poolformer.py; arXiv 2210.13452;
sail-sg/metaformer, metaformer_baselines.py.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Float, Int, Integer, PRNGKeyArray

# Epsilon of the norms in the first paper's blocks, and of PyTorch's norms. Flax's default is 1e-6.
EPSILON = 1e-5
# Epsilon of the norm after the mean, head_order="pool_norm": timm's LayerNorm2d.
POOLED_EPSILON = 1e-6
# Epsilon of the norms after the stem and before the other downsampling convolutions, in every network that has them.
DOWNSAMPLE_EPSILON = 1e-6


def gelu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The exact GELU, `x * Φ(x)` with the normal distribution's Φ, up to the rounding of the input's type.

    In float32 and float64 it is PyTorch's formula, `x / 2 * (1 + erf(x / √2))`. `jax.nn.gelu` uses erfc, which keeps
    more digits of the negligible negative tail and costs several times as much. In 16-bit types Φ is a tanh of an odd
    polynomial, fitted to within 5e-5, a fortieth of bfloat16's rounding; the usual "tanh GELU" differs by 5e-4.
    """
    if x.dtype.itemsize >= 4:
        return x * (0.5 + 0.5 * lax.erf(x * math.sqrt(0.5)))
    return gelu_fit(x.astype(jnp.float32))[0].astype(x.dtype)


def gelu_fit(x: Float[Array, "*s"]) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    """The GELU of `gelu` in 16-bit types, computed in float32, and its derivative."""
    square = jnp.minimum(x * x, 20)  # where the fit ends, 1 - Φ is below 4e-6
    a, b, c = 0.797507862, 0.0370056652, -3.51519695e-4
    tanh = jnp.tanh(x * (a + square * (b + square * c)))
    phi = 0.5 + 0.5 * tanh
    density = 0.5 * (1 - tanh * tanh) * (a + square * (3 * b + square * (5 * c)))
    return x * phi, phi + x * density


_gelu_tanh = partial(jax.nn.gelu, approximate=True)


def star_relu(x: Float[Array, "*s"], scale: Float[Array, "1"], bias: Float[Array, "1"]) -> Float[Array, "*s"]:
    """`scale * relu(x)² + bias` with two learnt numbers (arXiv 2210.13452)."""
    return jnp.square(jax.nn.relu(x)) * scale[0].astype(x.dtype) + bias[0].astype(x.dtype)


# By their names in `transformers`. Its "gelu" is the exact erf form; Flax's default is the tanh approximation. They
# take a feature map, and as keywords the parameters that `parameter_table` lists below `mlp/act`.
ACTIVATIONS: dict[str, Callable[..., Array]] = {
    "gelu": gelu,
    "gelu_10": lambda x: jnp.clip(gelu(x), -10, 10),
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": jax.nn.hard_swish,
    "laplace": lambda x: 0.5 + 0.5 * lax.erf((x - 0.707107) / (0.282095 * math.sqrt(2))),
    "leaky_relu": jax.nn.leaky_relu,
    "linear": lambda x: x,
    "mish": jax.nn.mish,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "sqrtsoftplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    "star_relu": star_relu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def group_norm(
    x: Float[Array, "b h w c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"] | None = None,
    epsilon: float = EPSILON,
) -> Float[Array, "b h w c"]:
    """Group normalisation with ONE group: each image is standardised over its height, width and channels together."""
    return _affine(_standardize(x, (1, 2, 3), epsilon), scale, bias).astype(x.dtype)


def layer_norm(
    x: Float[Array, "*b c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"] | None = None,
    epsilon: float = EPSILON,
) -> Float[Array, "*b c"]:
    """Layer normalisation over the channels of each position."""
    return _affine(_standardize(x, (-1,), epsilon), scale, bias).astype(x.dtype)


# The norms of a block and of the head.
NORMS: Mapping[str, Callable[..., Array]] = {"group_norm": group_norm, "layer_norm": layer_norm}


def standardize(x: Float[Array, "*s"], axes: tuple[int, ...], epsilon: float = EPSILON) -> Float[Array, "*s"]:
    """`(x - mean) / std` over some axes, in the type of its input; what a norm does before gain and shift."""
    return _standardize(x, axes, epsilon).astype(x.dtype)


def _standardize(x: Float[Array, "*s"], axes: tuple[int, ...], epsilon: float) -> Float[Array, "*s"]:
    distance, inverse_std = distance_and_inverse_std(x, axes, epsilon)
    return distance * inverse_std


def distance_and_inverse_std(
    x: Float[Array, "*s"], axes: tuple[int, ...], epsilon: float = EPSILON
) -> tuple[Float[Array, "*s"], Float[Array, "*s2"]]:
    """`x - mean`, and 1 / std with the axes kept, in at least float32."""
    x = widen(x)
    distance = x - jnp.mean(x, axes, keepdims=True)
    # The variance from centred values: E[x²] - E[x]² cancels where the mean is large.
    return distance, lax.rsqrt(jnp.mean(jnp.square(distance), axes, keepdims=True) + epsilon)


def _affine(
    x: Float[Array, "*b c"], scale: Float[Array, " c"], bias: Float[Array, " c"] | None
) -> Float[Array, "*b c"]:
    scaled = x * over_channels(scale, x)
    return scaled if bias is None else scaled + over_channels(bias, x)


def over_channels(vector: Float[Array | np.ndarray, " c"], x: Float[Array, "*b #c"]) -> Float[Array, "*ones c"]:
    """`vector` cast to x.dtype and reshaped to broadcast over its channels."""
    return jnp.asarray(vector, x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def dense(
    x: Float[Array, "*b c"], kernel: Float[Array, "c d"], bias: Float[Array, " d"] | None = None
) -> Float[Array, "*b d"]:
    """A dense layer over the channels, computed in the type of its input."""
    y = x @ kernel.astype(x.dtype)
    return y if bias is None else y + over_channels(bias, y)


def widen(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """`x` in at least float32, for sums and for intermediate results that must not be rounded."""
    return x.astype(wide_type(x.dtype))


def wide_type(dtype: Dtype) -> Dtype:
    """`dtype` if it is float32 or float64, else float32."""
    # Not promote_types, which refuses to mix types where jax_numpy_dtype_promotion is "strict".
    wide = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize >= 4
    return dtype if wide else jnp.float32


def average_pool(x: Float[Array, "b h w c"], pool_size: int) -> Float[Array, "b h w c"]:
    """Mean over the window around each pixel, stride 1, counting only the pixels inside the image.

    The same as `torch.nn.AvgPool2d(pool_size, 1, pool_size // 2, count_include_pad=False)`. The result keeps the
    input's type; `flax.linen.avg_pool` would turn bfloat16 into float32 here.
    """
    return _window_sum(x, pool_size) / _window_counts(x, pool_size)


def _window_sum(x: Float[Array, "b h w c"], pool_size: int) -> Float[Array, "b h w c"]:
    # Columns, then rows: 2k additions instead of k², and XLA vectorises a one-dimensional window several times better.
    margin = pool_size // 2
    for axis in (1, 2):
        dimensions, padding = [1] * 4, [(0, 0)] * 4
        dimensions[axis], padding[axis] = pool_size, (margin, margin)
        x = lax.reduce_window(x, np.zeros((), x.dtype), lax.add, dimensions, (1,) * 4, padding)
    return x


def _window_counts(x: Float[Array, "b h w c"], pool_size: int) -> Float[np.ndarray, "1 h w 1"]:
    return window_counts(x.shape[1], x.shape[2], pool_size)[None, :, :, None].astype(x.dtype)


def window_counts(height: int, width: int, pool_size: int) -> Int[np.ndarray, "h w"]:
    """How many pixels of the window around each pixel lie inside the image."""
    return np.outer(_window_sizes(height, pool_size), _window_sizes(width, pool_size))


def _window_sizes(length: int, window: int) -> np.ndarray:
    """How many of the `window` pixels around each of `length` pixels in a row lie inside the row."""
    position = np.arange(length)
    margin = window // 2
    return np.minimum(position + margin, length - 1) - np.maximum(position - margin, 0) + 1


def pooling_mixer(x: Float[Array, "b h w c"], pool_size: int) -> Float[Array, "b h w c"]:
    """PoolFormer's token mixer, `average_pool(x) - x` (Equation 4 of the paper).

    The block adds its input again, so the mixer subtracts it. A constant map gives exactly 0.
    """
    return average_pool(x, pool_size) - x


def pooling_mixer_transpose(dy: Float[Array, "b h w c"], pool_size: int) -> Float[Array, "b h w c"]:
    """The gradient of `pooling_mixer` by its input, from the gradient `dy` of its output.

    It divides before it sums over windows; the transpose of a window sum is the same window sum.
    """
    return _window_sum(dy / _window_counts(dy, pool_size), pool_size) - dy


def attention(qkv: Float[Array, "b h w c3"], head_dim: int) -> Float[Array, "b h w c"]:
    """Softmax attention over all positions.

    Args:
        qkv: queries, keys and values, each head by head along the channels.
        head_dim: channels of a head.
    """
    batch, height, width, channels = qkv.shape
    # Axes are merged, and split, one pair at a time: jax does no more to arrays with explicit shardings.
    tokens = qkv.reshape(batch, height * width, channels)
    heads = tokens.reshape(batch, height * width, 3, channels // 3 // head_dim, head_dim)
    query, key, value = jnp.moveaxis(heads, 2, 0)  # each [b, h * w, heads, head_dim]
    scores = jnp.einsum("bqhd,bkhd->bhqk", query * head_dim**-0.5, key)
    weights = jax.nn.softmax(widen(scores)).astype(qkv.dtype)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, height * width, channels // 3)
    return mixed.reshape(batch, height, width, channels // 3)


def mix_positions(x: Float[Array, "b h w c"], kernel: Float[Array, "n n"]) -> Float[Array, "b h w c"]:
    """A matrix product over the positions, row by row: kernel [positions in, positions out]."""
    batch, height, width, channels = x.shape
    tokens = x.reshape(batch, height * width, channels).swapaxes(1, 2)
    return dense(tokens, kernel).swapaxes(1, 2).reshape(x.shape)


def depthwise_convolution(x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"]) -> Float[Array, "b h w c"]:
    """A convolution of each channel with a separate kernel, stride 1, zero padding of half the kernel; k is odd."""
    margin = len(kernel) // 2
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        window_strides=(1, 1),
        padding=[(margin, margin)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def drop_path(key: PRNGKeyArray, x: Float[Array, "b ..."], rate: float) -> Float[Array, "b ..."]:
    """Stochastic depth (arXiv 1603.09382): zeroes whole samples with probability `rate` and scales up the others.

    Args:
        key: not used by any other residual branch.
        x: a residual branch, one sample per row.
        rate: probability of dropping a sample, in [0, 1).
    """
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    keep = jax.random.bernoulli(key, 1 - rate, shape)
    return jnp.where(keep, x / np.asarray(1 - rate, x.dtype), np.zeros((), x.dtype))


def drop_path_rates(rate: float, depths: tuple[int, ...]) -> tuple[tuple[float, ...], ...]:
    """The drop-path rate of every block, by stage: from 0 in the first block of all to `rate` in the last."""
    rates = np.linspace(0.0, rate, sum(depths))
    return tuple(tuple(map(float, stage)) for stage in np.split(rates, np.cumsum(depths)[:-1]))


def cross_entropy(
    logits: Float[Array, "b labels"], labels: Integer[Array, " b"] | Float[Array, "b labels"]
) -> Float[Array, " b"]:
    """Cross entropy of each sample in nats, in at least float32.

    Args:
        logits: unnormalised log-probabilities.
        labels: class indices, or one probability per class (mixup, label smoothing).

    Returns:
        The losses; NaN where an index is not a class.
    """
    log_probabilities = jax.nn.log_softmax(widen(logits))
    if labels.ndim == 1:
        # The number of classes may not fit into 8 bits. take_along_axis cuts an index to 32 bits, and counts a negative
        # one from the end.
        classes, labels = logits.shape[-1], labels.astype(int)
        known = jnp.where((labels >= 0) & (labels < classes), labels, classes)
        return -jnp.take_along_axis(log_probabilities, known[:, None], axis=-1, mode="fill")[:, 0]
    return -jnp.sum(labels * log_probabilities, axis=-1)

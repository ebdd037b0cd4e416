"""Checks of the network's inputs: the shape of the pixels, and the type to compute in."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jaxtyping import Array, Num

from poolformer_jax.errors import InputError
from poolformer_jax.network.config import PoolFormerConfig

# Of any shape, because `check_pixel_values` raises a clearer error than an annotation.
Pixels = Num[Array | np.ndarray, "..."]


def check_config(config: Any) -> None:
    """Raises ValueError unless this is a config."""
    if not isinstance(config, PoolFormerConfig):
        raise InputError(
            f"config={config!r}: expected a PoolFormerConfig, such as PoolFormerConfig.from_variant('s12')."
        )


def check_dtype(dtype: Dtype) -> None:
    """Raises ValueError unless feature maps can be computed in `dtype`."""
    types = (jnp.float32, jnp.bfloat16, jax.dtypes.canonicalize_dtype(jnp.float64))
    try:
        fits = dtype is not None and jnp.dtype(dtype) in types  # NumPy takes None for float64
    except TypeError:
        fits = False
    if not fits:
        raise InputError(f"dtype={dtype!r}: expected float32 or bfloat16, or float64 with JAX_ENABLE_X64=1.")


def check_pixel_values(
    config: PoolFormerConfig,
    shape: tuple[Any, ...],  # Any: a symbolic batch
    dtype: Dtype = jnp.float32,
) -> None:
    """Raises ValueError, with a message that says how to fix it, if the network cannot take such an input."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(
            f"pixel_values has dtype {jnp.dtype(dtype).name}. Expected normalised floating-point pixels, as "
            "PoolFormerImageProcessor returns them."
        )
    channels, smallest = config.num_channels, config.smallest_side
    wanted = f"Expected [batch, height, width, {channels}]"
    if len(shape) != 4:
        raise InputError(f"pixel_values has shape {shape}. {wanted}; add the batch axis with pixel_values[None].")
    if shape[3] != channels:
        if shape[1] == channels:
            advice = "; this looks like PyTorch's NCHW: use pixel_values.transpose(0, 2, 3, 1)."
        else:
            advice = f", because config.num_channels={channels}."
        raise InputError(f"pixel_values has shape {shape}. {wanted}{advice}")
    if min(shape[1:3]) < smallest:
        raise InputError(
            f"pixel_values has shape {shape}, which is too small for this network. "
            f"{wanted} with height and width of at least {smallest} pixels; resize the images."
        )
    if config.image_size is not None and not _has_the_positions(config, *shape[1:3]):
        raise InputError(
            f"pixel_values has shape {shape}, and this network has parameters for every position of images of "
            f"{config.image_size} by {config.image_size} pixels. Resize the images, or take a network without position "
            "embeddings, spatial_fc and random."
        )


def _has_the_positions(config: PoolFormerConfig, height: int, width: int) -> bool:
    """True for images of `config.image_size`, or whose feature maps have as many positions as the mixers need."""
    side = config.image_size
    assert side is not None
    mixing = [stage for stage, mixer in enumerate(config.token_mixers) if mixer in ("spatial_fc", "random")]
    if (height, width) == (side, side) or any(config.position_embeddings) or not mixing:
        return (height, width) == (side, side)
    sides, heights, widths = (config.feature_sizes(length) for length in (side, height, width))
    return all(heights[stage] * widths[stage] == sides[stage] ** 2 for stage in mixing)

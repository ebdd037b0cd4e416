"""Mean and variance of each image's feature map, as values that travel with the map.

A group norm with one group needs two numbers of an image. Where they are known beforehand it costs no pass over the
map, so `fused` sums them where a map is computed, and hands them on.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from poolformer_jax.network.functional import EPSILON, widen

_Map = Float[Array, "b h w c"]
_PerImage = Float[Array, " b"]
_AXES = (1, 2, 3)


class Moments(NamedTuple):
    """Mean and variance of each image over height, width and channels, in at least float32."""

    mean: _PerImage
    variance: _PerImage

    @property
    def inverse_std(self) -> _PerImage:
        """What group norm multiplies with."""
        return lax.rsqrt(self.variance + EPSILON)


@jax.custom_vjp
def moments_of(x: _Map) -> Moments:
    """The moments of a map that comes without: mean first, then the variance from centred values."""
    x = widen(x)
    mean = jnp.mean(x, _AXES)
    return Moments(mean, jnp.mean(jnp.square(x - over_map(mean)), _AXES))


def _moments_forward(x: _Map) -> tuple[Moments, tuple[_Map, Moments]]:
    x_moments = moments_of(x)
    return x_moments, (x, x_moments)


def _moments_backward(residuals: tuple[_Map, Moments], dmoments: Moments) -> tuple[_Map]:
    x, x_moments = residuals
    return (through(x, x_moments, jnp.zeros_like(x), dmoments),)


moments_of.defvjp(_moments_forward, _moments_backward)


def around(pivot: _PerImage, y: _Map) -> Moments:
    """Moments in one pass, from sums around a value near the mean."""
    distance = widen(y) - over_map(pivot)
    return from_sums(pivot, math.prod(y.shape[1:]), jnp.sum(distance, _AXES), jnp.sum(jnp.square(distance), _AXES))


def from_sums(pivot: _PerImage, size: int, total: _PerImage, squares: _PerImage) -> Moments:
    """Moments of `size` numbers, from the sums of their distance to `pivot` and of its square."""
    offset = total / size
    # Rounding may leave less than nothing where an image is constant.
    return Moments(pivot + offset, jnp.maximum(squares / size - jnp.square(offset), 0))


def slope_and_offset(size: int, y_moments: Moments, dmoments: Moments) -> tuple[_PerImage, _PerImage]:
    """What reaches a map of `size` numbers through its moments is `slope * y + offset`."""
    slope = 2 * dmoments.variance / size
    return slope, dmoments.mean / size - slope * y_moments.mean


def through(y: _Map, y_moments: Moments, dy: _Map, dmoments: Moments) -> _Map:
    """The whole gradient of `y`: its own, and what reaches it through its mean and variance."""
    slope, offset = slope_and_offset(math.prod(y.shape[1:]), y_moments, dmoments)
    return (widen(dy) + widen(y) * over_map(slope) + over_map(offset)).astype(dy.dtype)


def standardize_with(x: _Map, x_moments: Moments) -> _Map:
    """`(x - mean) / std`, rounded once."""
    return ((widen(x) - over_map(x_moments.mean)) * over_map(x_moments.inverse_std)).astype(x.dtype)


def through_standardized(x_moments: Moments, total: _PerImage, products: _PerImage) -> Moments:
    """What reaches the moments through the standardised map `z`, from sums over each image of `dz` and of `z * dz`."""
    inverse_std = x_moments.inverse_std
    return Moments(-inverse_std * total, -0.5 * inverse_std**2 * products)


def over_map(per_image: _PerImage) -> Float[Array, "b 1 1 1"]:
    """A number of each image, to be broadcast over its map."""
    return per_image[:, None, None, None]

"""Mean and variance of each image's feature map, as values that are passed along with the map.

A group norm with one group needs two numbers of an image. `block` sums them while it computes a map, and returns them
with it, so the next norm needs no pass over the map.
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
        """`1 / sqrt(variance + epsilon)`, the factor of group norm."""
        return lax.rsqrt(self.variance + EPSILON)


@jax.custom_vjp
def moments_of(x: _Map) -> Moments:
    """The moments of a map in two passes: the mean, then the variance from centred values."""
    x = widen(x)
    mean = jnp.mean(x, _AXES)
    return Moments(mean, jnp.mean(jnp.square(x - broadcast_over_map(mean)), _AXES))


def _moments_forward(x: _Map) -> tuple[Moments, tuple[_Map, Moments]]:
    x_moments = moments_of(x)
    return x_moments, (x, x_moments)


def _moments_backward(residuals: tuple[_Map, Moments], dmoments: Moments) -> tuple[_Map]:
    x, x_moments = residuals
    return (add_moments_gradient(x, x_moments, jnp.zeros_like(x), dmoments),)


moments_of.defvjp(_moments_forward, _moments_backward)


def shifted_moments(shift: _PerImage, y: _Map) -> Moments:
    """The moments of a map in one pass, from sums of `y - shift` and its square; `shift` is near the mean."""
    distance = widen(y) - broadcast_over_map(shift)
    return moments_from_sums(
        shift, math.prod(y.shape[1:]), jnp.sum(distance, _AXES), jnp.sum(jnp.square(distance), _AXES)
    )


def moments_from_sums(shift: _PerImage, size: int, total: _PerImage, squares: _PerImage) -> Moments:
    """Moments of `size` numbers, from the sums of their distances to `shift` and of the distances' squares."""
    offset = total / size
    # Rounding may make the variance of a constant image negative.
    return Moments(shift + offset, jnp.maximum(squares / size - jnp.square(offset), 0))


def moments_gradient_coefficients(size: int, y_moments: Moments, dmoments: Moments) -> tuple[_PerImage, _PerImage]:
    """(slope, offset): through its moments, `y` with `size` numbers per image has the gradient `slope * y + offset`."""
    slope = 2 * dmoments.variance / size
    return slope, dmoments.mean / size - slope * y_moments.mean


def add_moments_gradient(y: _Map, y_moments: Moments, dy: _Map, dmoments: Moments) -> _Map:
    """The total gradient of `y`: `dy`, and the gradient through its mean and variance."""
    slope, offset = moments_gradient_coefficients(math.prod(y.shape[1:]), y_moments, dmoments)
    return (widen(dy) + widen(y) * broadcast_over_map(slope) + broadcast_over_map(offset)).astype(dy.dtype)


def standardize(x: _Map, x_moments: Moments) -> _Map:
    """`(x - mean) / std`, rounded once."""
    return ((widen(x) - broadcast_over_map(x_moments.mean)) * broadcast_over_map(x_moments.inverse_std)).astype(x.dtype)


def standardize_gradient_of_moments(x_moments: Moments, total: _PerImage, products: _PerImage) -> Moments:
    """The gradient of `z = standardize(x)` by the moments, from the sums over each image of `dz` and of `z * dz`."""
    inverse_std = x_moments.inverse_std
    return Moments(-inverse_std * total, -0.5 * inverse_std**2 * products)


def broadcast_over_map(per_image: _PerImage) -> Float[Array, "b 1 1 1"]:
    """One number per image, reshaped to broadcast over the image's map."""
    return per_image[:, None, None, None]

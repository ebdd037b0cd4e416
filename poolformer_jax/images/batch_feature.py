"""What preprocessing returns: a dictionary whose entries are attributes too, as transformers' `BatchFeature` is."""

import functools
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Float32

from poolformer_jax.errors import InputError, MissingDependencyError
from poolformer_jax.messages import short_repr


class BatchFeature(dict[str, Any]):
    """`inputs["pixel_values"]`, `inputs.pixel_values` and `model(**inputs)` work. jax treats it as it treats a dict."""

    def __init__(self, *args: Any, **entries: Any) -> None:
        super().__init__(*args, **entries)
        if "jax" in sys.modules:  # without it nothing asks for a pytree
            _register_pytree()

    def __reduce__(self) -> tuple[Any, ...]:
        return BatchFeature, (dict(self),)  # through the constructor, which pickle would skip

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"BatchFeature has no {name!r}. It has: {', '.join(self)}.") from None


@functools.cache
def _register_pytree() -> None:
    from jax import tree_util

    def flatten(feature: BatchFeature) -> tuple[tuple[Any, ...], tuple[str, ...]]:
        return tuple(feature.values()), tuple(feature)

    def unflatten(names: tuple[str, ...], values: Iterable[Any]) -> BatchFeature:
        return BatchFeature(zip(names, values, strict=True))

    tree_util.register_pytree_node(BatchFeature, flatten, unflatten)


def as_tensor(pixels: Float32[np.ndarray, "..."], return_tensors: Any) -> Any:
    """The pixels as an array of NumPy (None, "np"), jax ("jax") or PyTorch ("pt").

    Raises InputError for another `return_tensors`; MissingDependencyError for "pt" without PyTorch.
    """
    if return_tensors in (None, "np"):
        return pixels
    if return_tensors == "jax":
        import jax.numpy as jnp

        return jnp.asarray(pixels)
    if return_tensors == "pt":
        try:
            import torch
        except ImportError:
            raise MissingDependencyError(
                'return_tensors="pt" needs PyTorch. Install it with: pip install torch. Or pass "np" or "jax".'
            ) from None
        return torch.from_numpy(pixels)
    raise InputError(f"return_tensors={short_repr(return_tensors)}. Expected 'np', 'jax', 'pt' or None.")

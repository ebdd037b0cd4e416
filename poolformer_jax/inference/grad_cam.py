"""Grad-CAM: which part of an image is evidence for a class (arXiv 1610.02391).

Layer and colours are those of sail-sg/poolformer, misc/cam_image.py: the last stage's output; each channel weighted by
the mean gradient of the class's logit; negative evidence set to 0; scaled to 0..1, enlarged bilinearly to the image and
laid over it half transparent. The authors squash the image to 224 x 224. Here it is preprocessed as for classification,
so that the map explains the prediction of `ImageClassifier`.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, UInt8

from poolformer_jax.errors import InputError
from poolformer_jax.images import ImageLike, PoolFormerImageProcessor
from poolformer_jax.inference.folding import fold
from poolformer_jax.inference.from_pretrained import FromPretrained
from poolformer_jax.inference.jax_operations import folded_features, folded_head
from poolformer_jax.inference.verification import check_finite
from poolformer_jax.network import PoolFormerConfig, check_has_probabilities, probabilities
from poolformer_jax.weights import class_names

# Shorter side, in pixels, that overlays of smaller images are enlarged to: the input of the published networks.
VISIBLE_SIDE = 224


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The evidence for one class in one image."""

    label: int  # index of the class
    probability: float  # its probability
    # The image as the network saw it, resized and cropped; uint8 [height, width, channels].
    picture: UInt8[np.ndarray, "h w c"]
    heatmap: Float32[np.ndarray, "h w"]  # evidence for the class, float32 [height, width] from 0 to 1

    def overlay(self, shorter_side: int = 1) -> UInt8[np.ndarray, "h2 w2 3"]:
        """The picture with the heatmap over it: red is evidence for the class, blue the lack of it.

        Args:
            shorter_side: a picture whose shorter side has fewer pixels is enlarged by the largest whole factor that
                keeps this side within `shorter_side` pixels.
        """
        mixed = jet(self.heatmap) + self.picture / 255
        factor = max(1, shorter_side // min(self.heatmap.shape))
        rounded: UInt8[np.ndarray, "h w 3"] = np.rint(255 * mixed / mixed.max()).astype(np.uint8)
        return rounded.repeat(factor, 0).repeat(factor, 1)


class GradCam(FromPretrained):
    """Explains classifications; compiled once per image size.

    It takes no options of `ImageClassifier`: it explains one image at a time, in float32 with JAX, because exported
    files have no gradients.

    Args:
        config: the architecture of a classifier.
        variables: `{"params": tree}`.
        image_processor: the preprocessing.

    Raises:
        ValueError: if the network has no head or is a regression.
    """

    def __init__(
        self, config: PoolFormerConfig, variables: Mapping[str, Any], image_processor: PoolFormerImageProcessor
    ) -> None:
        check_has_probabilities(config)
        self.config = config
        self.image_processor = image_processor
        self.id2label = class_names(config)
        self._params = fold(config, variables)
        self._explain = jax.jit(partial(_explain, config))

    def __call__(self, image: ImageLike, label: int | str | None = None) -> Explanation:
        """Explains one image.

        Args:
            image: anything that `PoolFormerImageProcessor.read` takes.
            label: index or name of the class to explain; by default the most probable one.

        Raises:
            ImageError: if the image cannot be read.
            ValueError: if `label` is not the index or the name of one class.
        """
        if isinstance(label, str):
            label = label_index(label, self.id2label)
        if label is not None and not 0 <= label < self.config.num_labels:
            raise InputError(f"label={label}. Expected an index from 0 to {self.config.num_labels - 1}.")
        picture = self.image_processor.resize_and_crop(image)
        pixel_values = self.image_processor.normalize(picture[None])
        inputs = jax.device_put((pixel_values, np.int32(-1 if label is None else label)))
        heatmap, chosen, probability = jax.device_get(self._explain(self._params, *inputs))
        check_finite(heatmap, probability)
        return Explanation(int(chosen), float(probability), picture, heatmap)


def label_index(label: str, names: Mapping[int, str]) -> int:
    """The index of the class with the name or index `label`."""
    matches = [index for index, name in names.items() if label in (name, *name.split(", "))]
    if len(matches) > 1:  # two classes of ImageNet are called "crane"
        raise InputError(f"The classes {' and '.join(map(str, matches))} are both called {label!r}. Give the index.")
    if matches:
        return matches[0]
    if label.isdecimal() and int(label) in names:
        return int(label)
    near = difflib.get_close_matches(label, [part for name in names.values() for part in name.split(", ")], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise InputError(f"There is no class {label!r}.{hint} Expected a name or an index from 0 to {len(names) - 1}.")


def _explain(
    config: PoolFormerConfig, folded: dict[str, Any], pixel_values: Float[Array, "1 h w c"], label: Int[Array, ""]
) -> tuple[Float[Array, "h w"], Int[Array, ""], Float[Array, ""]]:
    features = folded_features(config, folded, pixel_values)[-1]
    logits, gradient_of = jax.vjp(partial(folded_head, config, folded), features)
    chosen = jnp.where(label < 0, jnp.argmax(logits), label)
    (gradient,) = gradient_of(jax.nn.one_hot(chosen, config.num_labels, dtype=logits.dtype)[None])
    weights = gradient.mean((1, 2))
    evidence = jax.nn.relu(jnp.einsum("bhwc,bc->hw", features, weights))
    # Scaled again after enlarging, which interpolates and so can miss the extremes.
    enlarged = jax.image.resize(_scale_to_one(evidence), pixel_values.shape[1:3], "bilinear")
    return _scale_to_one(enlarged), chosen, probabilities(config, logits)[0, chosen]


def _scale_to_one(values: Float[Array, "h w"]) -> Float[Array, "h w"]:
    """Scales to 0..1; a constant map becomes 0."""
    values = values - values.min()
    return values / (values.max() + 1e-7)


def jet(values: Float32[np.ndarray, "*s"]) -> Float32[np.ndarray, "*s 3"]:
    """The "jet" colours, from blue at 0 over green to red at 1, as RGB from 0 to 1."""
    peaks = np.array([3, 2, 1], np.float32)  # of red, green and blue, in quarters
    return np.clip(1.5 - np.abs(4 * values[..., None] - peaks), 0, 1)

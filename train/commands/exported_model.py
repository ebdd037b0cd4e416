"""Exported files in an evaluation: they compute logits on the host, and the compiled step counts."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from poolformer_jax import PoolFormerConfig
from poolformer_jax.export import ExportedFile
from poolformer_jax.network import ImageClassifierOutput


@dataclasses.dataclass(frozen=True)
class LogitsAsPixels:
    """A `Classifier` for batches whose "image" holds logits."""

    config: PoolFormerConfig

    def apply(self, variables: Any, logits: Any) -> ImageClassifierOutput:
        """The logits, unchanged."""
        return ImageClassifierOutput(loss=None, logits=logits, hidden_states=())


def logits_of_batches(
    exported: ExportedFile, batches: Iterable[Mapping[str, Any]], flip: bool
) -> Iterator[Mapping[str, Any]]:
    """The batches with an exported network's logits, [batch, labels], in place of their 8-bit images.

    Args:
        exported: the network.
        batches: with "image", resized and cropped.
        flip: average the logits of every image and of its mirror image.
    """

    def logits(images: np.ndarray) -> np.ndarray:
        images = np.ascontiguousarray(images)
        return exported.run(images if exported.takes_uint8 else exported.image_processor.normalize(images))

    for batch in batches:
        images = batch["image"]
        result = (logits(images) + logits(images[:, :, ::-1])) / 2 if flip else logits(images)
        yield {**batch, "image": result}

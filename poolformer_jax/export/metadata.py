"""What the user of an exported file needs to know: the preprocessing, the labels, input and output."""

import dataclasses
import json
from collections.abc import Mapping

from poolformer_jax.images import PoolFormerImageProcessor
from poolformer_jax.network import PoolFormerConfig, resolved_problem_type
from poolformer_jax.version import __version__

# How the user of an exported file turns logits into what the problem asks for.
_PROBABILITIES = {
    "single_label_classification": "their softmax is the probability of each id2label",
    "multi_label_classification": "their sigmoid is the probability of each id2label, independent of the others",
    "regression": "the predicted numbers",
}


def metadata(
    config: PoolFormerConfig,
    image_processor: PoolFormerImageProcessor,
    id2label: Mapping[int, str],
    image_size: tuple[int, int],
    *,
    any_size: bool = False,
    dtype: str = "float32",
    uint8: bool = False,
    probabilities: bool = False,
) -> dict[str, str]:
    """The metadata of an exported file. Every value is text; values with parts are JSON.

    Keys: `config`, `preprocessor_config` (both as on the Hub), `id2label`, `input`, `output`, `dtype`, `producer`.
    """
    sides = f"height, width, {config.num_channels}]; any size from {config.smallest_side} pixels; " if any_size else ""
    sides = sides or f"{image_size[0]}, {image_size[1]}, {config.num_channels}], "
    colours = "greyscale" if config.num_channels == 1 else "RGB"
    if config.num_labels:
        output = f"logits: float32 [batch, {config.num_labels}]; {_PROBABILITIES[resolved_problem_type(config)]}"
    else:
        output = f"logits: float32 [batch, {config.hidden_sizes[-1]}]; pooled and normalised, there is no head"
    if probabilities:
        output += "; and the probabilities, float32 of the same shape"
    return {
        "config": json.dumps(config.to_dict()),
        "preprocessor_config": json.dumps(_with_output_size(image_processor, image_size).to_dict()),
        "id2label": json.dumps({str(index): label for index, label in sorted(id2label.items())}),
        "input": f"pixel_values: {'uint8' if uint8 else 'float32'} [batch, {sides}"
        f"resized{' and cropped' if uint8 else ', cropped, rescaled and normalised'} as "
        f"preprocessor_config says; channels last, {colours}",
        "output": output,
        "dtype": dtype,
        "producer": f"poolformer-jax {__version__}",
    }


def _with_output_size(
    image_processor: PoolFormerImageProcessor, image_size: tuple[int, int]
) -> PoolFormerImageProcessor:
    """The same preprocessing, for images of `image_size`."""
    if image_processor.output_size == image_size:
        return image_processor
    height, width = image_size
    sides = {"height": height, "width": width}
    size = {"shortest_edge": height} if height == width else sides
    return dataclasses.replace(image_processor, do_resize=True, size=size, do_center_crop=True, crop_size=sides)

"""The evaluation preprocessing, from pictures to the network's input; training evaluates with it too.

Results are equal to the bit to those of `PoolFormerImageProcessor` in `transformers`, Pillow backend: resize so that
the shorter edge is `int(224 / crop_pct)`, crop the middle, rescale to 0..1, normalise. `reading` turns files into
pictures. Data-loading processes use this module without jax.

Source: transformers, models/poolformer/image_processing_pil_poolformer.py and image_transforms.py.
"""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, no_type_check

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from poolformer_jax.fields import (
    BOOLEAN,
    INTEGER,
    NUMBER,
    STRING,
    FieldType,
    check_rules,
    convert_fields,
    optional,
    sequence_of,
)
from poolformer_jax.files import write_json
from poolformer_jax.images import processor_config
from poolformer_jax.images.reading import ImageError, ImageLike, read_image

# Published networks with crop_pct 0.95 (default_cfg in the authors' poolformer.py and metaformer.py).
_LARGE_CROP = ("m36", "m48", "metaformer_pppa_s12_224", "metaformer_ppaa_s12_224", "metaformer_ppff_s12_224")


@dataclasses.dataclass(frozen=True)
class PoolFormerImageProcessor:
    """Turns pictures into `pixel_values`. The field names are those of `transformers`.

    Args:
        do_resize: resize.
        size: `{"shortest_edge": pixels}`, or `{"height": pixels, "width": pixels}`.
        crop_pct: the part of the resized edge that the crop keeps: the edge is resized to int(size / crop_pct). 0.9
            for s12, s24, s36 and 0.95 for m36, m48. None resizes to `size`.
        resample: Pillow's number of the filter; 3 is bicubic.
        do_center_crop: crop the middle. A smaller picture gets a black margin.
        crop_size: `{"height": pixels, "width": pixels}`.
        do_rescale: multiply by `rescale_factor`.
        rescale_factor: 1/255 maps 8-bit samples to 0..1.
        do_normalize: subtract `image_mean` and divide by `image_std`.
        image_mean: per channel; three values for an RGB input, one for a greyscale input.
        image_std: per channel.

    Raises:
        ValueError: naming every field of a wrong type or out of range.
    """

    do_resize: bool = True
    # hash=False: a dict has no hash; equality still compares it.
    size: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"shortest_edge": 224}, hash=False)
    crop_pct: float | None = 0.9
    resample: int = 3
    do_center_crop: bool = True
    crop_size: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"height": 224, "width": 224}, hash=False)
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: Sequence[float] = (0.485, 0.456, 0.406)
    image_std: Sequence[float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        convert_fields(self, _KINDS)
        check_rules(self, _rules(self))

    @property
    def num_channels(self) -> int:
        """Channels of the network's input: 3 (RGB) or 1 (greyscale)."""
        return len(self.image_mean)

    @property
    def output_size(self) -> tuple[int, int] | None:
        """Height and width of every result in pixels; None if they depend on the picture."""
        if self.do_center_crop:
            return self.crop_size["height"], self.crop_size["width"]
        if self.do_resize and self.crop_pct is None and "height" in self.size:
            return self.size["height"], self.size["width"]
        return None

    @property
    def shorter_edge(self) -> int | None:
        """The shorter edge of every resized picture in pixels; None if resizing does not keep the aspect ratio."""
        edge, *other = self.size.values()
        # One edge keeps the aspect ratio, and so does a square with a crop_pct.
        if other and (self.crop_pct is None or other != [edge]):
            return None
        return int(edge / (self.crop_pct or 1.0))

    def preprocess(
        self, images: ImageLike, *, input_data_format: str | None = None
    ) -> dict[str, Float32[np.ndarray, "b h w c"]]:
        """One picture or several as a batch for the network.

        Args:
            images: a path, bytes, a Pillow image, an array [h, w], [h, w, c] or [c, h, w]; an iterable of these; or
                an array of four axes, the first of which is the batch. `reading` has the rules.
            input_data_format: "channels_last" or "channels_first" for arrays; None infers it from the shape.

        Returns:
            {"pixel_values": float32 [batch, height, width, channels]}.

        Raises:
            ImageError: naming every picture that cannot be read, or if the results differ in size.
        """
        one = is_one_image(images)
        results: list[UInt8[np.ndarray, "h w c"]] = []
        problems: list[str] = []
        for index, image in enumerate([images] if one else images):
            try:
                results.append(self.resize_and_crop(image, input_data_format=input_data_format))
            except ImageError as error:
                problems.append(str(error) if one else f"image {index}: {error}")
        if problems:
            raise ImageError("\n".join(problems))
        if not results:
            raise ImageError("No image was given. Expected at least one.")
        if len(shapes := sorted({result.shape for result in results})) > 1:
            raise ImageError(
                f"The images have different sizes after preprocessing, {', '.join(map(str, shapes))}. Expected one "
                "size for a batch: preprocess them one by one, or set do_center_crop=True."
            )
        return {"pixel_values": self.normalize(np.stack(results))}

    __call__ = preprocess

    def resize_and_crop(self, image: ImageLike, *, input_data_format: str | None = None) -> UInt8[np.ndarray, "h w c"]:
        """One picture resized and cropped, still in 8 bits, for a device that normalises it.

        Raises:
            ImageError: if the picture cannot be read, or is too long and thin to be resized.
        """
        picture = read_image(image, self.num_channels, input_data_format)
        if self.do_resize:
            picture = self._resize(picture)
        pixels = np.asarray(picture)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        if self.do_center_crop:
            pixels = _center_crop(pixels, self.crop_size["height"], self.crop_size["width"])
        return pixels

    def normalize(self, pixels: UInt8[np.ndarray, "*b h w c"]) -> Float32[np.ndarray, "*b h w c"]:
        """The network's input for 8-bit pixels, by a table of 256 values per channel."""
        table = self._table()
        return np.stack([table[channel][pixels[..., channel]] for channel in range(self.num_channels)], axis=-1)

    def scale_and_shift(self) -> tuple[Float32[np.ndarray, " c"], Float32[np.ndarray, " c"]]:
        """`scale`, `shift` such that `pixels * scale + shift` is `normalize(pixels)` to float32 rounding."""
        scale = np.full(self.num_channels, self.rescale_factor if self.do_rescale else 1.0)
        shift = np.zeros(self.num_channels)
        if self.do_normalize:
            scale, shift = scale / self.image_std, -np.divide(self.image_mean, self.image_std)
        return scale.astype(np.float32), shift.astype(np.float32)

    def _table(self) -> Float32[np.ndarray, "c 256"]:
        # Rounded to float32 after each step, as in transformers, for results that are equal to the bit.
        values = np.arange(256) * (self.rescale_factor if self.do_rescale else 1.0)
        table = np.tile(values.astype(np.float32), (self.num_channels, 1))
        if self.do_normalize:
            mean, std = np.asarray(self.image_mean, np.float32), np.asarray(self.image_std, np.float32)
            table = (table - mean[:, None]) / std[:, None]
        return table

    def _resize(self, picture: Image.Image) -> Image.Image:
        height, width = self._resized_size(picture.height, picture.width)
        limit = Image.MAX_IMAGE_PIXELS
        if min(height, width) < 1 or (limit is not None and height * width > limit):
            raise ImageError(
                f"An image of {picture.width} x {picture.height} pixels would be resized to {width} x {height}: "
                "it is too long and thin. Expected an image of ordinary proportions; crop it first."
            )
        return picture.resize((width, height), Image.Resampling(self.resample))

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing. Every division is rounded down, as in transformers."""
        if (short := self.shorter_edge) is None:
            percentage = self.crop_pct or 1.0
            return int(self.size["height"] / percentage), int(self.size["width"] / percentage)
        long = int(short * max(height, width) / min(height, width))
        return (long, short) if width <= height else (short, long)

    @classmethod
    def for_variant(cls, name: str, **changes: Any) -> "PoolFormerImageProcessor":
        """The preprocessing of the published variant `name` ("s12", ...)."""
        return cls(**{"crop_pct": 0.95 if name.removeprefix("poolformer_") in _LARGE_CROP else 0.9, **changes})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PoolFormerImageProcessor":
        """Reads the entries of a preprocessor_config.json of any version of `transformers`, or timm's `pretrained_cfg`.

        Raises:
            ValueError: naming every entry that would change the pixels in a way that is not implemented here.
        """
        return cls(**processor_config.fields_from(data, {field.name for field in dataclasses.fields(cls)}))

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **hub_options: Any) -> "PoolFormerImageProcessor":
        """The preprocessing saved with a model.

        Args:
            source: a folder, a file in it, or the name of a repository on the Hub. Its preprocessor_config.json is
                read, or else timm's `pretrained_cfg` in its config.json.
            hub_options: revision, cache_dir, local_files_only, token, as in `load_pretrained`.

        Raises:
            FileNotFoundError: if there is no such model, or it has neither file.
            ModuleNotFoundError: if the model is on the Hub and huggingface_hub is not installed.
        """
        return cls.from_dict(processor_config.read(source, **hub_options))

    def to_dict(self) -> dict[str, Any]:
        """The entries of preprocessor_config.json, which `transformers` reads too."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
        return {"image_processor_type": "PoolFormerImageProcessor", **data}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes preprocessor_config.json into `folder`, whole or not at all."""
        write_json(Path(folder).expanduser() / processor_config.PREPROCESSOR_CONFIG, self.to_dict())


def is_one_image(images: ImageLike) -> bool:
    """True for one picture, False for an iterable of pictures or an array of them."""
    if isinstance(images, Image.Image | str | bytes | bytearray | memoryview | os.PathLike):
        return True
    if hasattr(images, "__array__"):
        return len(getattr(images, "shape", ())) != 4
    # Open files and mappings are iterable too, but not iterables of pictures. `read_image` refuses them.
    return not isinstance(images, Iterable) or isinstance(images, Mapping) or hasattr(images, "read")


def _center_crop(pixels: UInt8[np.ndarray, "h w c"], height: int, width: int) -> UInt8[np.ndarray, "h2 w2 c"]:
    """The middle [height, width]. Outside of the picture it is black (0 before normalisation)."""
    original_height, original_width, channels = pixels.shape
    result = np.zeros((height, width, channels), np.uint8)
    source_rows, target_rows = _middle(original_height, height)
    source_columns, target_columns = _middle(original_width, width)
    result[target_rows, target_columns] = pixels[source_rows, source_columns]
    return result


def _middle(length: int, wanted: int) -> tuple[slice, slice]:
    """The slice of `length` pixels to copy, and the slice of `wanted` pixels to copy it to."""
    if length >= wanted:
        start = (length - wanted) // 2
        return slice(start, start + wanted), slice(0, wanted)
    # transformers puts the larger half of the padding first, and then crops the padded picture.
    start = math.ceil((wanted - length) / 2)
    return slice(0, length), slice(start, start + length)


_SIDES = FieldType(
    'pixels by name such as {"shortest_edge": 224}',
    lambda value: (
        isinstance(value, Mapping) and all(map(STRING.accepts, value)) and all(map(INTEGER.accepts, value.values()))
    ),
    lambda value: {name: int(side) for name, side in value.items()},
)
_KINDS: Mapping[str, FieldType] = {
    **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), BOOLEAN),
    **dict.fromkeys(("size", "crop_size"), _SIDES),
    **dict.fromkeys(("image_mean", "image_std"), sequence_of(NUMBER, "numbers, one per channel")),
    "crop_pct": optional(NUMBER),
    "resample": INTEGER,
    "rescale_factor": NUMBER,
}
# `__post_init__` reports wrong types better than the type checker of the tests, which would run before it.
no_type_check(PoolFormerImageProcessor.__init__)


def _rules(processor: PoolFormerImageProcessor) -> list[tuple[str, bool, str]]:
    """(field, True if it is in range, what is expected)."""

    def sides(mapping: Mapping[str, int], *allowed: set[str]) -> bool:
        return set(mapping) in allowed and all(side > 0 for side in mapping.values())

    two_sides = {"height", "width"}
    channels = processor.image_mean
    return [
        ("size", sides(processor.size, {"shortest_edge"}, two_sides), "shortest_edge, or height and width, in pixels"),
        ("crop_size", sides(processor.crop_size, two_sides), "height and width, in pixels"),
        ("crop_pct", processor.crop_pct is None or 0 < processor.crop_pct <= 1, "None or a share in (0, 1]"),
        ("resample", processor.resample in set(Image.Resampling), "a number of Pillow's filters, 0 to 5"),
        ("image_mean", len(channels) in (1, 3), "one value per channel, of 1 or 3 channels"),
        ("image_std", len(processor.image_std) == len(channels), "as many values as image_mean"),
        ("image_std", all(std > 0 for std in processor.image_std), "positive values"),
        ("rescale_factor", processor.rescale_factor > 0, "a positive number"),
    ]


# The name that older versions of transformers use.
PoolFormerFeatureExtractor = PoolFormerImageProcessor


def share_of_edge(processor: PoolFormerImageProcessor, side: int, edge: int) -> float:
    """The crop_pct for which a crop of `side` pixels is resized to `edge`; the processor's, if it fits."""
    # int(side / (side / edge)) may be edge - 1.
    shares = (processor.crop_pct or 1.0, side / edge, math.nextafter(side / edge, 0))
    return next(share for share in shares if int(side / share) == edge)


def unit_mean_and_std(processor: PoolFormerImageProcessor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of the normalisation of pixels in 0..1."""
    unit = 255 * (processor.rescale_factor if processor.do_rescale else 1)
    unchanged = (0.0,) * processor.num_channels, (1.0,) * processor.num_channels
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else unchanged
    return [value / unit for value in mean], [value / unit for value in std]

"""The evaluation preprocessing, from pictures to the network's input; training evaluates with it too.

Results are equal to the bit to those of `PoolFormerImageProcessor` in `transformers`, Pillow backend: resize so that
the shorter edge is `int(224 / crop_pct)`, crop the middle, rescale to 0..1, normalise. `reading` turns files into
pictures. Data-loading processes use this module without jax.

Source: transformers, models/poolformer/image_processing_pil_poolformer.py and image_transforms.py.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, no_type_check

import numpy as np
from jaxtyping import Float, Float32, Num, UInt8
from PIL import Image

from poolformer_jax.errors import InputError
from poolformer_jax.fields import NUMBER, check_rules, convert_fields
from poolformer_jax.hub import SavedAsJson
from poolformer_jax.images import processor_config
from poolformer_jax.images.batch_feature import BatchFeature, as_tensor
from poolformer_jax.images.image_lists import flatten_images, is_one_image
from poolformer_jax.images.normalization import Normalization
from poolformer_jax.images.processor_config import CROP_PCT
from poolformer_jax.images.processor_fields import FIELD_TYPES, pad_sides, rules, sides_of
from poolformer_jax.images.reading import DATA_FORMATS, ImageError, ImageLike, read_image
from poolformer_jax.images.transforms import center_crop, on_white, pad, to_8_bits, to_channels, unscaled_array
from poolformer_jax.messages import short_repr

# Keywords of transformers that change no pixels: of its PyTorch backend, and of models with text.
_WITHOUT_EFFECT = ("disable_grouping", "image_seq_length")


@dataclasses.dataclass(frozen=True)
class PoolFormerImageProcessor(SavedAsJson):
    """Turns pictures into `pixel_values`. The field names, and the forms of their values, are those of `transformers`.

    Args:
        do_resize: resize.
        size: `{"shortest_edge": pixels}` or one number; `{"height": pixels, "width": pixels}` or `[height, width]`.
        crop_pct: the part of the resized edge that the crop keeps: the edge is resized to int(size / crop_pct). 0.9
            for s12, s24, s36 and 0.95 for m36, m48. None resizes to `size`.
        resample: Pillow's number of the filter, or its name; 3 is "bicubic".
        do_center_crop: crop the middle. A smaller picture gets a black margin.
        crop_size: `{"height": pixels, "width": pixels}`, `[height, width]`, or one number for a square.
        do_rescale: multiply by `rescale_factor`.
        rescale_factor: 1/255 maps 8-bit samples to 0..1.
        do_normalize: subtract `image_mean` and divide by `image_std`.
        image_mean: per channel; three values for an RGB input, one for a greyscale input. A number is used for all
            channels.
        image_std: per channel.
        do_convert_rgb: put transparent Pillow images and arrays on white, as in `transformers`. By
            default transparency is dropped. All images are converted to the network's channels in any case.

    Raises:
        ValueError: naming every field of a wrong type or out of range.
    """

    file_name: ClassVar[str] = processor_config.PREPROCESSOR_CONFIG

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
    do_convert_rgb: bool | None = None

    def __post_init__(self) -> None:
        convert_fields(self, FIELD_TYPES)
        given = (self.image_mean, self.image_std)
        channels = next((len(values) for values in given if isinstance(values, tuple)), 3)
        for name, values in zip(("image_mean", "image_std"), given, strict=True):
            if not isinstance(values, tuple):
                object.__setattr__(self, name, (values,) * channels)
        check_rules(self, rules(self))

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
        self,
        images: ImageLike,
        *,
        return_tensors: str | None = None,
        data_format: str | None = None,
        input_data_format: str | None = None,
        do_pad: bool | None = None,
        pad_size: Any = None,
        device: Any = None,
        **changes: Any,
    ) -> BatchFeature:
        """One picture or several as a batch for the network.

        Args:
            images: a path, bytes, a Pillow image, an array [h, w], [h, w, c] or [c, h, w]; an iterable of these, nested
                at most once; or an array of four axes, the first of which is the batch. `reading` has the rules.
                Floats are used as they are with do_rescale=False, as in `transformers`. With do_rescale=True, floats
                from 0 to 1 give the pixels of the same picture in 8 bits; `transformers` would rescale them twice.
            return_tensors: "np" or None for a NumPy array, "jax" or "pt" for one of jax or PyTorch.
            data_format: "channels_last" or None, or "channels_first" as in PyTorch.
            input_data_format: "channels_last" or "channels_first" for arrays; None infers it from the shape.
            do_pad: put zeros below and to the right of each result, up to `pad_size` or the largest result.
            pad_size: as `crop_size`.
            device: None or "cpu".
            changes: other values of the processor's fields for this call, such as `size=256`. None switches a `do_...`
                off, as in `transformers`.

        Returns:
            A dictionary with "pixel_values": float32 [batch, height, width, channels]. `inputs.pixel_values` works too.

        Raises:
            ImageError: naming every picture that cannot be read, or if the results differ in size.
            ValueError: naming every unknown keyword, or every value of a wrong type or out of range.
            ModuleNotFoundError: for "pt" without PyTorch.
        """
        processor = self._with(changes)
        if data_format not in (None, *DATA_FORMATS):
            raise InputError(f"data_format={short_repr(data_format)}. Expected {' or '.join(map(repr, DATA_FORMATS))}.")
        if device is not None and str(device) != "cpu":
            raise InputError(
                f"device={short_repr(device)}. Images are processed on the CPU; jax.device_put moves them."
            )
        results = processor._preprocess_each(images, input_data_format)
        if do_pad:
            results = pad(results, pad_sides(pad_size))
        if len(shapes := sorted({result.shape for result in results})) > 1:
            raise ImageError(
                f"The images have different sizes after preprocessing, {', '.join(map(str, shapes))}. Expected one "
                "size for a batch: preprocess them one by one, or set do_center_crop=True or do_pad=True."
            )
        batch = np.stack(results)
        if data_format == "channels_first":
            batch = np.ascontiguousarray(np.moveaxis(batch, -1, 1))
        return BatchFeature(pixel_values=as_tensor(batch, return_tensors))

    __call__ = preprocess

    def _preprocess_each(self, images: ImageLike, data_format: str | None) -> list[Float32[np.ndarray, "_ _ c"]]:
        one = is_one_image(images)
        results: list[Float32[np.ndarray, "_ _ c"]] = []
        problems: list[str] = []
        for index, image in enumerate([images] if one else flatten_images(images)):
            try:
                results.append(self._preprocess_one(image, data_format))
            except ImageError as error:
                problems.append(str(error) if one else f"image {index}: {error}")
        if problems:
            more = [f"and {len(problems) - 20:,} more"] if len(problems) > 20 else []
            raise ImageError("\n".join(problems[:20] + more))
        if not results:
            raise ImageError("No image was given. Expected at least one.")
        return results

    def _preprocess_one(self, image: ImageLike, data_format: str | None) -> Float32[np.ndarray, "h w c"]:
        if self.do_convert_rgb:
            image, data_format = on_white(image, data_format)
        array = unscaled_array(image, data_format, self.do_rescale)
        if array is None:
            return self.normalize(self.resize_and_crop(image, input_data_format=data_format))
        if not self.do_resize:
            return self.normalize(self._crop(to_channels(array, self.num_channels)))
        eight_bits, multiplied = to_8_bits(array)
        pixels = self.resize_and_crop(eight_bits, input_data_format="channels_last")
        return self.normalize((pixels * (1 / 255)).astype(np.float32) if multiplied else pixels)

    def read(self, image: ImageLike, input_data_format: str | None = None) -> Image.Image:
        """One picture before it is resized, for which `preprocess` gives the same result.

        Args:
            image: what `preprocess` takes as one picture, except for arrays that have no 8-bit form: with
                do_rescale=False floats from 0 to 1, and with do_resize=False all but whole numbers from 0 to 255.
            input_data_format: as in `preprocess`.

        Raises:
            ImageError: if the picture cannot be read.
        """
        if self.do_convert_rgb:
            image, input_data_format = on_white(image, input_data_format)
        array = unscaled_array(image, input_data_format, self.do_rescale)
        if array is not None:
            (image, multiplied), input_data_format = to_8_bits(array), "channels_last"
            if multiplied or not (self.do_resize or np.array_equal(image, array)):
                raise ImageError(
                    f"An image array has values from {array.min():.9g} to {array.max():.9g}. Expected whole numbers "
                    "from 0 to 255, because batches hold 8 bits; or call the model with what `preprocess` returns."
                )
        return read_image(image, self.num_channels, input_data_format)

    def resize_and_crop(
        self, image: ImageLike, *, input_data_format: str | None = None, to_even: bool = False
    ) -> UInt8[np.ndarray, "h w c"]:
        """One picture resized and cropped, still in 8 bits, for a device that normalises it.

        Args:
            image: the picture, as in `read`.
            input_data_format: as in `preprocess`.
            to_even: a crop that would begin at half a pixel begins at the even one, as in torchvision and timm, and not
                at the one before, as in transformers.

        Raises:
            ImageError: if the picture cannot be read, or is too long and thin to be resized.
        """
        picture = self.read(image, input_data_format)
        if self.do_resize:
            picture = self._resize(picture)
        pixels = np.asarray(picture)
        return self._crop(pixels[..., None] if pixels.ndim == 2 else pixels, to_even)

    def _crop(self, pixels: Num[np.ndarray, "h w c"], to_even: bool = False) -> Num[np.ndarray, "h2 w2 c"]:
        size = self.crop_size["height"], self.crop_size["width"]
        return center_crop(pixels, *size, to_even) if self.do_center_crop else pixels

    def normalize(
        self, pixels: UInt8[np.ndarray, "*b h w c"] | Float[np.ndarray, "*b h w c"]
    ) -> Float32[np.ndarray, "*b h w c"]:
        """The network's input for pixels that are resized and cropped."""
        return self.normalization(pixels)

    def scale_and_shift(self) -> tuple[Float32[np.ndarray, " c"], Float32[np.ndarray, " c"]]:
        """`scale`, `shift` such that `pixels * scale + shift` is `normalize(pixels)` to float32 rounding."""
        return self.normalization.scale_and_shift()

    @property
    def normalization(self) -> Normalization:
        """The last step of the preprocessing."""
        factor = self.rescale_factor if self.do_rescale else None
        mean, std = (self.image_mean, self.image_std) if self.do_normalize else (None, None)
        return Normalization(self.num_channels, factor, mean, std)

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

    def _with(self, changes: Mapping[str, Any]) -> "PoolFormerImageProcessor":
        """This processor with other values of its fields, in the forms that transformers takes."""
        fields = {field.name for field in dataclasses.fields(self)}
        expected = (*fields, "default_to_square", *_WITHOUT_EFFECT)
        if unknown := [f"{name}={short_repr(value)}" for name, value in changes.items() if name not in expected]:
            raise InputError(f"Unknown keywords: {', '.join(unknown)}. Expected: {', '.join(sorted(expected))}.")
        values = {name: value for name, value in changes.items() if name in fields}
        for name, value in changes.items():
            if value is None and name.startswith("do_"):
                values[name] = None if name == "do_convert_rgb" else False
            elif value is None and name != "crop_pct":
                values.pop(name, None)
            elif name == "size" and changes.get("default_to_square"):
                values[name] = sides_of(value, square=True) or value
            elif name in ("image_mean", "image_std") and NUMBER.accepts(value):
                values[name] = (value,) * self.num_channels
        return dataclasses.replace(self, **values) if values else self

    @classmethod
    def for_variant(cls, name: str, **changes: Any) -> "PoolFormerImageProcessor":
        """The preprocessing of the published variant `name` ("s12", "poolformer_s12", an ablation, ...).

        Raises:
            ValueError: if there is no such variant.
        """
        if (key := name.removeprefix("poolformer_")) not in CROP_PCT:
            raise InputError(f"There is no variant {name!r}. Expected one of: {', '.join(CROP_PCT)}.")
        return cls(crop_pct=CROP_PCT[key])._with(changes)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], **changes: Any) -> "PoolFormerImageProcessor":
        """Reads the entries of a preprocessor_config.json of any version of `transformers`, or timm's `pretrained_cfg`.

        Raises:
            ValueError: naming every entry that would change the pixels in a way that is not implemented here, or every
                name in `changes` that is unknown.
        """
        return cls(**processor_config.fields_from(data, {field.name for field in dataclasses.fields(cls)}))._with(
            changes
        )

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **changes: Any,
    ) -> "PoolFormerImageProcessor":
        """The preprocessing saved with a model.

        Args:
            source: a folder, a file in it, or the name of a repository on the Hub. Its preprocessor_config.json is
                read, or else timm's `pretrained_cfg` in its config.json.
            revision: branch, tag or commit on the Hub.
            cache_dir: the Hub's cache.
            local_files_only: use the cache without asking the Hub.
            token: for private models.
            changes: other values of the fields, such as `crop_pct=0.95`.

        Raises:
            FileNotFoundError: if there is no such model, or it has neither file.
            ModuleNotFoundError: if the model is on the Hub and huggingface_hub is not installed.
            ValueError: as in `from_dict`.
        """
        data = processor_config.read(
            source, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token
        )
        return cls.from_dict(data, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The entries of preprocessor_config.json, which `transformers` reads too."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
        if self.do_convert_rgb is None:
            del data["do_convert_rgb"]
        return {"image_processor_type": "PoolFormerImageProcessor", **data}

    def to_json_string(self) -> str:
        """The text of preprocessor_config.json as `transformers` writes it: two spaces of indentation, sorted names."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"


# `__post_init__` reports wrong types better than the type checker of the tests, which would run before it.
no_type_check(PoolFormerImageProcessor.__init__)

# The name that older versions of transformers use.
PoolFormerFeatureExtractor = PoolFormerImageProcessor


def share_of_edge(processor: PoolFormerImageProcessor, side: int, edge: int) -> float:
    """The crop_pct for which a crop of `side` pixels is resized to `edge`; the processor's, if it fits."""
    # int(side / (side / edge)) may be edge - 1.
    shares = (processor.crop_pct or 1.0, side / edge, math.nextafter(side / edge, 0))
    return next(share for share in shares if int(side / share) == edge)

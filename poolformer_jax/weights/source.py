"""Opens a model: finds its files and identifies its network, without reading the arrays.

config.json has three dialects: transformers', timm's, and this package's, which is transformers' with more fields.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

from poolformer_jax.errors import InputError, MissingFileError
from poolformer_jax.files import parse_json, read_json
from poolformer_jax.hub import HubOptions, NotInCache
from poolformer_jax.images import PREPROCESSOR_CONFIG, PoolFormerImageProcessor
from poolformer_jax.messages import printable
from poolformer_jax.network import PoolFormerConfig
from poolformer_jax.weights.containers.files import WeightsFile, open_weights
from poolformer_jax.weights.detection import infer_config
from poolformer_jax.weights.matching import MatchedNames
from poolformer_jax.weights.model_files import ModelFiles, find_model_files
from poolformer_jax.weights.published import changes_named, class_names, default_image_processor, published_config
from poolformer_jax.weights.timm_config import is_timms, with_timms_config
from poolformer_jax.weights.transfer import (
    ImportPlan,
    check_head_epsilon,
    match_state_dict,
    plan_import,
    warn_of_assumptions,
)

_EXPECTED = "an object, a PoolFormer's config.json"
# Our safetensors files carry their config under this key of their metadata, and need no config.json.
CONFIG_METADATA = "poolformer_jax.config"


@dataclass(frozen=True)
class OpenedModel:
    """A model whose files were found and whose weights match its network. No array has been read yet."""

    files: ModelFiles  # where its files are
    weights: WeightsFile  # names, types and shapes of its arrays
    plan: ImportPlan  # the parameter that each array becomes
    # What no array and no name shows about the network, in words; None if nothing was assumed.
    assumed: str | None = None

    @property
    def config(self) -> PoolFormerConfig:
        """The network."""
        return self.plan.config

    @cached_property
    def labels(self) -> dict[int, str]:
        """A name for every class: the model's, ImageNet's for published networks, or "class 0", ..."""
        return class_names(self.config)

    @cached_property
    def saved_image_processor(self) -> PoolFormerImageProcessor | None:
        """The preprocessing saved with the weights; None if there is none.

        Raises InputError if it cannot be read; NotInCache if the Hub may have one and could not be asked.
        """
        try:
            return PoolFormerImageProcessor.from_pretrained(self.files.weights)
        except MissingFileError:
            if self.files.not_in_cache is not None:
                raise self.files.not_in_cache from None
            return None

    @cached_property
    def default_image_processor(self) -> PoolFormerImageProcessor | None:
        """The preprocessing of the published weights of this name and architecture; None for other architectures."""
        return default_image_processor(self.config, _given_names(self.files, self.weights))

    @cached_property
    def image_processor(self) -> PoolFormerImageProcessor:
        """The preprocessing saved with the weights, or else that of the published weights of this name.

        Raises InputError if there is neither, or it cannot be read.
        """
        remedy = "Or in Python pass image_processor=PoolFormerImageProcessor(...)."
        try:
            processor = self.saved_image_processor or self.default_image_processor
        except NotInCache as error:
            raise InputError(f"{error} {remedy}") from error
        if processor is None:
            raise InputError(
                f"{self.files.source} has no {PREPROCESSOR_CONFIG} and is not a published network, whose preprocessing "
                f"is known. Write one beside the weights: PoolFormerImageProcessor(...).save_pretrained(folder). "
                f"{remedy}"
            )
        return processor

    def read_variables(self) -> dict[str, Any]:
        """Reads the arrays: `{"params": tree}` of NumPy's float32 arrays."""
        return self.plan.read(self.weights.tensors)


def open_model(
    source: str | os.PathLike[str],
    *,
    config: PoolFormerConfig | None = None,
    variant: str | None = None,
    ignore: Sequence[str] = (),
    use_ema: bool = False,
    any_classes: bool = False,
    **hub_options: Unpack[HubOptions],
) -> OpenedModel:
    """Finds a model's files and checks that its weights match its network, without reading the arrays.

    The arguments are those of `load_pretrained`. With `any_classes`, `config` may have another number of classes than
    the weights.

    Raises:
        MissingFileError: if there is no such model.
        WeightsFileError: if the weights file is damaged or hostile.
        WeightsMismatch: if the weights are not those of the network.
        InputError: if the network cannot be determined, or config.json contradicts the weights.
    """
    files = find_model_files(source, **hub_options)
    weights = open_weights(files.weights, use_ema=use_ema, ignore=ignore)
    if config is not None and any_classes:
        config = config.with_changes(num_labels=infer_config(match_state_dict(weights.tensors)).num_labels)
    return identify_model(files, weights, variant, config)


def identify_model(
    files: ModelFiles, weights: WeightsFile, variant: str | None = None, config: PoolFormerConfig | None = None
) -> OpenedModel:
    """Determines the network of opened weights and matches their names and shapes with it.

    `variant` is the name of a published network; None to take it from config.json, or to infer it from the weights. The
    errors are those of `open_model`.
    """
    matched = match_state_dict(weights.tensors)
    if config is not None:
        if variant is not None:
            raise InputError(f"config=... and variant={variant!r} were given. Expected one of them.")
        return OpenedModel(files, weights, plan_import(matched, config))
    if variant is not None:
        found, _, certain = _config_of(files, weights, matched, by_name=False)
        kept = ("num_labels", "id2label", "head_order", "head_norm_epsilon", "problem_type")
        config = published_config(variant, **{name: getattr(found, name) for name in kept})
        opened = OpenedModel(files, weights, plan_import(matched, config, f"the variant {variant!r}"))
        if not certain:
            check_head_epsilon(matched, config, str(files.weights))
        return opened
    config, config_source, certain = _config_of(files, weights, matched)
    opened = OpenedModel(files, weights, plan_import(matched, config, config_source))
    if certain:
        return opened
    return dataclasses.replace(opened, assumed=warn_of_assumptions(matched, config, str(files.weights)))


def _config_of(
    files: ModelFiles, weights: WeightsFile, matched: MatchedNames, *, by_name: bool = True
) -> tuple[PoolFormerConfig, str, bool]:
    """The network according to config.json, completed from names and shapes, and by the names of published files.

    Returns:
        The config, where it comes from (for messages), and whether nothing about it was assumed.
    """
    data, path = _saved_config(files, weights)
    if data is not None and not is_timms(data):
        if "num_labels" not in data and not data.get("id2label"):
            data = {**data, "num_labels": infer_config(matched).num_labels}
        return _config_from_dict(data, path), f"the config in {path}", True
    config = infer_config(matched)
    changes = _named_changes(files, weights, data, config) if by_name else None
    config = _with_changes(config, changes or {})
    if data is not None:
        config = with_timms_config(config, data, path)
    return config, "their names and shapes", changes is not None and (matched.layout != "jax" or config.head != "mlp")


def _named_changes(
    files: ModelFiles, weights: WeightsFile, timms_config: Mapping[str, Any] | None, config: PoolFormerConfig
) -> Mapping[str, Any] | None:
    """In what the network differs from the inferred one, by the first names that say so; None if no name does.

    Raises InputError if the file and what it contains name different networks.
    """
    inside = [weights.architecture or "", str((timms_config or {}).get("architecture", ""))]
    named = {text: changes_named(text, config) for text in (*inside, files.weights.name)}
    found = {text: changes for text, changes in named.items() if changes is not None}
    if any(changes != next(iter(found.values())) for changes in found.values()):
        raise InputError(
            f"{files.weights} and what it contains name different networks: {', '.join(map(printable, found))}. Say "
            "which it is with config=... or variant=... (--variant)."
        )
    around = (changes_named(text, config) for text in _given_names(files, weights))
    return next((changes for changes in (*found.values(), *around) if changes is not None), None)


def _given_names(files: ModelFiles, weights: WeightsFile) -> tuple[str, ...]:
    """What a model is called: in its file, by its file, by the folder of the file, and by the caller."""
    return (
        *([weights.architecture] if weights.architecture else []),
        files.weights.name,
        files.weights.resolve().parent.name,
        Path(files.source).name,
    )


def _with_changes(config: PoolFormerConfig, changes: Mapping[str, Any]) -> PoolFormerConfig:
    """The network with the fields of an ablation, for as many stages as it has."""
    fitting: dict[str, Any] = {
        name: value[:1] * len(config.depths) if isinstance(value, tuple) else value for name, value in changes.items()
    }
    return dataclasses.replace(config, **fitting)


def _saved_config(files: ModelFiles, weights: WeightsFile) -> tuple[dict[str, Any] | None, Path]:
    """The entries of config.json, or of the config in the weights' metadata; None if there is neither."""
    known = {"architecture", "architectures", "model_type", *(f.name for f in dataclasses.fields(PoolFormerConfig))}
    if files.config is not None:
        data = read_json(files.config, _EXPECTED)
        if not known.isdisjoint(data):  # other programs write a config.json too, such as a trainer's settings
            return data, files.config
    if text := weights.metadata.get(CONFIG_METADATA):
        return parse_json(text, weights.path, _EXPECTED), weights.path
    return None, weights.path


def read_config(path: Path) -> PoolFormerConfig | None:
    """The network in a config.json; None for timm's, which does not describe the layers.

    Raises InputError if it is not a JSON object, or not a PoolFormer's.
    """
    data = read_json(path, _EXPECTED)
    return None if is_timms(data) else _config_from_dict(data, path)


def _config_from_dict(data: Mapping[str, Any], path: Path) -> PoolFormerConfig:
    if "model_type" not in data:
        raise InputError(
            f"The config in {path} has no model_type. Expected model_type 'poolformer' or 'metaformer', or timm's "
            "config.json."
        )
    try:
        return PoolFormerConfig.from_dict(data)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise InputError(f"The config in {path} is malformed: {error}") from error

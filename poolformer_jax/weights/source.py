"""Finds a model's files, on the Hugging Face Hub or on disk, and identifies its network.

Weights are looked for under the names that transformers, timm and this package give them, safetensors first.
config.json has three dialects: transformers', timm's, and this package's, which is transformers' with more fields.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from poolformer_jax.errors import InputError, MissingFileError
from poolformer_jax.files import parse_json, read_json
from poolformer_jax.hub import WEIGHTS_ENDINGS, NotInCache, Repository
from poolformer_jax.images import PREPROCESSOR_CONFIG, PoolFormerImageProcessor
from poolformer_jax.messages import printable, short_repr
from poolformer_jax.network import PoolFormerConfig
from poolformer_jax.weights.containers.files import WeightsFile, is_index, open_weights, read_index
from poolformer_jax.weights.detection import MatchedNames, infer_config
from poolformer_jax.weights.names import LAYOUTS
from poolformer_jax.weights.published import (
    AUTHORS_REPOSITORY,
    changes_named,
    class_names,
    default_image_processor,
    names_on_the_hub,
    published_config,
    timms_name,
    variants_like,
)
from poolformer_jax.weights.transfer import (
    ImportPlan,
    check_head_epsilon,
    match_state_dict,
    plan_import,
    say_what_is_assumed,
)

CONFIG = "config.json"
_EXPECTED = "an object, a PoolFormer's config.json"
# In the order of preference. An index names shards that lie beside it.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "flax_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model.pth",
    "model.pth.tar",
    "model.pth",
)
# Our safetensors files carry their config under this key of their metadata, and need no config.json.
CONFIG_METADATA = "poolformer_jax.config"


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model.

    Args:
        source: what the caller gave: a folder, a file, or a name on the Hub.
        weights: the weights, or the index of their shards.
        config: config.json; None if it is missing.
        not_in_cache: set if the Hub may have a preprocessor_config.json, but could not be asked.
    """

    source: str
    weights: Path
    config: Path | None
    not_in_cache: NotInCache | None = None


@dataclass(frozen=True)
class OpenedModel:
    """A model whose files were found and whose weights match its network. No array has been read yet.

    Args:
        files: where its files are.
        weights: names, types and shapes of its arrays.
        plan: the parameter that each array becomes.
        assumed: what no array and no name shows about the network, in words; None if nothing was assumed.
    """

    files: ModelFiles
    weights: WeightsFile
    plan: ImportPlan
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

        Raises:
            InputError: if it cannot be read.
            NotInCache: if the Hub may have one and could not be asked.
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

        Raises:
            InputError: if there is neither, or it cannot be read.
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
    **hub_options: Any,
) -> OpenedModel:
    """Finds a model's files and checks that its weights match its network, without reading the arrays.

    Args:
        source: a name on the Hub ("sail/poolformer_s12"), a folder, or a weights file.
        config: the network, for weights whose arrays do not determine it; None to take it from config.json or from the
            weights.
        variant: or the name of a published network ("s12", "poolformer_ln_s12", "metaformer_id_s12").
        ignore: patterns ("criterion.*") of names in the weights file to leave out, as in the shell.
        use_ema: take the moving average of the weights from a training checkpoint.
        hub_options: revision, cache_dir, local_files_only, token, as in `hub.Repository`.

    Raises:
        MissingFileError: if there is no such model.
        WeightsFileError: if the weights file is damaged or hostile.
        WeightsMismatch: if the weights are not those of the network.
        InputError: if the network cannot be determined, or config.json contradicts the weights.
    """
    files = find_model_files(source, **hub_options)
    weights = open_weights(files.weights, use_ema=use_ema, ignore=ignore)
    return identify_model(files, weights, variant, config)


def find_model_files(source: str | os.PathLike[str], **hub_options: Any) -> ModelFiles:
    """Finds the files of a model, and downloads them if `source` is a name on the Hub.

    Args:
        source: a folder, a weights file, or a name on the Hub ("sail/poolformer_s12"). The authors keep the weights of
            the second paper in one repository: "sail/dl/caformer/caformer_s18.pth".
        hub_options: revision, cache_dir, local_files_only, token, as in `hub.Repository`.

    Raises:
        MissingFileError: if there is no such model, or it has no weights.
        InputError: if a folder has several weights files, none with a standard name.
        MissingDependencyError: if the model is on the Hub and huggingface_hub is not installed.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = _weights_in(path)
    elif not path.is_file():
        _check_meant_for_the_hub(str(source), path, hub_options)
        if str(source).startswith(f"{AUTHORS_REPOSITORY}/"):
            return _download_file(AUTHORS_REPOSITORY, str(source).removeprefix(f"{AUTHORS_REPOSITORY}/"), hub_options)
        return _download(Repository(str(source), (CONFIG, *WEIGHTS), **hub_options))
    config = path.with_name(CONFIG)
    return ModelFiles(str(source), path, config if config.is_file() else None)


def _check_meant_for_the_hub(source: str, path: Path, hub_options: Mapping[str, Any]) -> None:
    """Refuses addresses, and mistyped paths, which would be looked for on the Hub (without a network, for long)."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", source):
        name = re.match(r"https?:/{1,2}(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", source)
        meant = f"the name on the Hugging Face Hub, {name[1]!r}" if name else "a model folder or a weights file"
        raise MissingFileError(f"{source} is an address. Addresses are not downloaded. Expected {meant}.")
    said = any(hub_options.get(name) for name in ("revision", "token", "local_files_only"))
    if path.parent != Path() and path.parent.is_dir() and source not in names_on_the_hub() and not said:
        raise MissingFileError(
            f"There is no model at {source}: the folder {path.parent} has no {path.name}. Expected a model folder or a "
            "weights file. If the name is one on the Hugging Face Hub, pass its revision, such as 'main', too."
        )


def _weights_in(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    files = sorted(path for path in folder.iterdir() if path.is_file())
    found = [path for path in files if is_index(path)]
    found = found or [path for path in files if path.name.endswith(WEIGHTS_ENDINGS)]
    if not found:
        if any(path.suffix == ".distcp" for path in files):
            raise InputError(
                f"The folder {folder} has the shards of a distributed checkpoint. Join them with PyTorch: python -m "
                f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pth"
            )
        if (script := folder / "zero_to_fp32.py").is_file():
            raise InputError(
                f"The folder {folder} has the shards of a DeepSpeed checkpoint. Join them: python {script} {folder} "
                "weights.pth"
            )
        raise MissingFileError(
            f"The folder {folder} has no weights. Expected model.safetensors, or another weights file."
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise InputError(f"The folder {folder} has several weights files: {names}. Give the path of one of them.")
    return found[0]


def _download_file(name: str, file: str, hub_options: Mapping[str, Any]) -> ModelFiles:
    repository = Repository(name, (file,), **hub_options)
    weights = repository.find(file)
    if weights is None:
        raise MissingFileError(
            f"{name} on the Hugging Face Hub has no {file}. Expected the path of a weights file in it, such as "
            f"{name}/caformer/caformer_s18.pth."
        )
    return ModelFiles(f"{name}/{file}", weights, None)


def _download(repository: Repository) -> ModelFiles:
    config = repository.find(CONFIG)
    weights = repository.find(*WEIGHTS)
    if weights is None:
        raise MissingFileError(
            f"{repository.name} on the Hugging Face Hub has no weights. Expected one of {', '.join(WEIGHTS)}."
        )
    if is_index(weights):
        for shard in sorted(read_index(weights)):
            repository.find(shard)
    not_in_cache = None
    try:
        repository.find(PREPROCESSOR_CONFIG)  # small, and offline the cache then has what a classifier needs
    except NotInCache as error:
        not_in_cache = error
    return ModelFiles(repository.name, weights, config, not_in_cache)


def identify_model(
    files: ModelFiles, weights: WeightsFile, variant: str | None = None, config: PoolFormerConfig | None = None
) -> OpenedModel:
    """Determines the network of opened weights and matches their names and shapes with it.

    Args:
        files: where they come from.
        weights: the opened weights.
        variant: name of a published network; None to take it from config.json, or to infer it from the weights.
        config: or the network itself.

    Raises:
        WeightsMismatch, InputError: as `open_model`.
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
    return dataclasses.replace(opened, assumed=say_what_is_assumed(matched, config, str(files.weights)))


def _config_of(
    files: ModelFiles, weights: WeightsFile, matched: MatchedNames, *, by_name: bool = True
) -> tuple[PoolFormerConfig, str, bool]:
    """The network according to config.json, completed from names and shapes, and by the names of published files.

    Returns:
        The config, where it comes from (for messages), and whether nothing about it was assumed.
    """
    data, path = _saved_config(files, weights)
    if data is not None and not _is_timms(data):
        if "num_labels" not in data and not data.get("id2label"):
            data = {**data, "num_labels": infer_config(matched).num_labels}
        return _config_from_dict(data, path), f"the config in {path}", True
    config = infer_config(matched)
    changes = _named_changes(files, weights, data, config) if by_name else None
    config = _with_changes(config, changes or {})
    if data is not None:
        config = _with_timms_config(config, data, path)
    return config, "their names and shapes", changes is not None and (matched.layout != "jax" or config.head != "mlp")


def _named_changes(
    files: ModelFiles, weights: WeightsFile, timms_config: Mapping[str, Any] | None, config: PoolFormerConfig
) -> Mapping[str, Any] | None:
    """In what the network differs from the inferred one, by the first names that say so; None if no name does.

    Raises:
        InputError: if the file and what it contains name different networks.
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
            return _check_model_type(data, files.config), files.config
    if text := weights.metadata.get(CONFIG_METADATA):
        return _check_model_type(parse_json(text, weights.path, _EXPECTED), weights.path), weights.path
    return None, weights.path


def read_config(path: Path) -> PoolFormerConfig | None:
    """The network in a config.json; None for timm's, which does not describe the layers.

    Raises:
        InputError: if it is not a JSON object, or not a PoolFormer's.
    """
    data = _check_model_type(read_json(path, _EXPECTED), path)
    return None if _is_timms(data) else _config_from_dict(data, path)


def _is_timms(data: Mapping[str, Any]) -> bool:
    """True for the entries of timm's config.json, False for those of transformers' or this package's."""
    return "architecture" in data


def _config_from_dict(data: Mapping[str, Any], path: Path) -> PoolFormerConfig:
    try:
        return PoolFormerConfig.from_dict(data)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise InputError(f"The config in {path} is malformed: {error}") from error


def _check_model_type(data: dict[str, Any], path: Path) -> dict[str, Any]:
    if not _is_timms(data) and data.get("model_type") not in ("poolformer", "metaformer"):
        raise InputError(
            f"The config in {path} is of a {short_repr(data.get('model_type'))} model. Expected model_type "
            "'poolformer' or 'metaformer', or timm's config.json."
        )
    return data


def _with_timms_config(config: PoolFormerConfig, data: Mapping[str, Any], path: Path) -> PoolFormerConfig:
    """The network, with the head order and the class names of timm's config.json."""
    try:
        labels = _timms_labels(data)
        given = {name: data[name] for name in ("num_classes", "global_pool") if name in data}
        given |= data.get("model_args") or {}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"timm's config in {path} is malformed: {error}") from error
    _check_timms_architecture(config, str(data["architecture"]), given, path)
    id2label = labels if labels and len(labels) == config.num_labels else None
    # Timm's model also takes weights with the authors' names.
    fixed = LAYOUTS["timm"].fixed_fields(config)
    return dataclasses.replace(config, **fixed, id2label=id2label, problem_type=data.get("problem_type"))


def _timms_labels(data: Mapping[str, Any]) -> dict[int, str] | None:
    """Class names by index; None if timm's config.json has none."""
    cfg = data.get("pretrained_cfg") or data
    names = data.get("label_names") or cfg.get("label_names") or data.get("labels")
    texts = data.get("label_descriptions") or cfg.get("label_descriptions") or {}
    if not names:
        return None
    by_index = names.items() if isinstance(names, Mapping) else enumerate(names)
    return {int(index): str(texts.get(label, label)) for index, label in by_index}


_NO_ENTRY = "no such entry"
# Entries of timm's config.json that have no effect at inference.
_TIMM_TRAINING = ("drop_rate", "drop_path_rate", "proj_drop_rate", "layer_scale_init_values")


def _check_timms_architecture(
    config: PoolFormerConfig, architecture: str, given: Mapping[str, Any], path: Path
) -> None:
    """Raises if timm's model, with the arguments `given`, computes something else with these weights."""
    expected = {
        "num_classes": config.num_labels,
        "global_pool": "avg",
        "in_chans": config.num_channels,
        "depths": list(config.depths),
        "dims": list(config.hidden_sizes),
    }
    wrong = [
        f"{printable(name)}={short_repr(value)}: expected {repr(expected[name]) if name in expected else _NO_ENTRY}"
        for name, value in given.items()
        if value is not None and value != expected.get(name) and name not in _TIMM_TRAINING
    ]
    known = [timms_name(name) for name in variants_like(config)]
    if (architecture := architecture.split(".")[0]) not in known:
        wrong.append(f"architecture={short_repr(architecture)}: expected {' or '.join(known)}")
    if wrong:
        raise InputError(
            f"timm's config in {path} does not match these weights, or needs a network that is not implemented here:"
            "\n  " + "\n  ".join(wrong)
        )

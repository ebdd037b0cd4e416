"""Where a model's files are, and which network they are of: on the Hugging Face Hub, in a folder, or one file.

Weights are looked for under the names that transformers and timm give them, safetensors first. A config.json is read in
three dialects: transformers', timm's, and this package's, which is transformers' with more fields.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poolformer_jax.errors import InputError, MissingFileError
from poolformer_jax.hub import WEIGHTS_ENDINGS, NotInCache, Repository
from poolformer_jax.images.processor_config import FILE as PREPROCESSOR
from poolformer_jax.network import SIZES, PoolFormerConfig, published_variant
from poolformer_jax.weights.containers.files import WeightsFile, WeightsFileError, is_index, read_index
from poolformer_jax.weights.names import LAYOUTS
from poolformer_jax.weights.transfer import plan_import

CONFIG = "config.json"
# In the order of preference. An index names shards that lie beside it.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model.pth",
    "model.pth.tar",
    "model.pth",
)
# A lone safetensors file of ours carries its config under this entry of its metadata, and needs no config.json.
CARRIED_CONFIG = "poolformer_jax.network.config"


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model.

    Args:
        weights: the weights, or the index of their shards.
        config: config.json; None if there is none.
    """

    weights: Path
    config: Path | None


def find_model_files(source: str | os.PathLike[str], **hub_options: Any) -> ModelFiles:
    """Finds the files of a model, and downloads them if `source` is a name on the Hub.

    Args:
        source: a folder, a weights file, or a name on the Hub ("sail/poolformer_s12").
        hub_options: revision, cache_dir, local_files_only, token, as in `hub.Repository`.

    Raises:
        FileNotFoundError: if there is no such model, or it has no weights.
        ValueError: if a folder has several weights files and none of a usual name.
        ModuleNotFoundError: if the Hub is asked for and huggingface_hub is not installed.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        config = path.with_name(CONFIG)
        return ModelFiles(path, config if config.is_file() else None)
    return _on_hub(Repository(str(source), (CONFIG, *WEIGHTS), **hub_options))


def _in_folder(folder: Path) -> ModelFiles:
    config = folder / CONFIG
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        files = sorted(path for path in folder.iterdir() if path.is_file())
        found = [path for path in files if is_index(path)]
        found = found or [path for path in files if path.name.endswith(WEIGHTS_ENDINGS)]
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise InputError(f"The folder {folder} has several weights files: {names}. Give the path of one of them.")
    if not found:
        raise MissingFileError(f"The folder {folder} holds no weights. Expected {WEIGHTS[0]}, or another weights file.")
    return ModelFiles(found[0], config if config.is_file() else None)


def _on_hub(repository: Repository) -> ModelFiles:
    config = repository.find(CONFIG)
    weights = repository.find(*WEIGHTS)
    if weights is None:
        raise MissingFileError(
            f"{repository.name} on the Hugging Face Hub holds no weights. Expected one of {', '.join(WEIGHTS)}."
        )
    if weights.name.endswith(".index.json"):
        try:
            shards = read_index(weights)
        except WeightsFileError as error:
            raise WeightsFileError(f"Cannot read the weights in {weights}: {error}.") from error
        for shard in sorted(shards):
            repository.find(shard)
    with suppress(NotInCache):  # small, and a cache that holds it serves a classifier offline
        repository.find(PREPROCESSOR)
    return ModelFiles(weights, config)


def read_config(path: Path) -> dict[str, Any]:
    """The entries of a config.json that is of a model.

    Raises:
        ValueError: if it is no JSON object, or of another kind of model.
    """
    return _written(path.read_bytes(), path)


def is_timms(config: Mapping[str, Any]) -> bool:
    """Whether these are the entries of timm's config.json, rather than of transformers' or this package's."""
    return "architecture" in config


def _written(text: str | bytes, path: Path) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"The config in {path} is no JSON ({error}). Expected the config.json of a PoolFormer."
        ) from error
    if not isinstance(data, dict):
        raise InputError(
            f"The config in {path} holds a {type(data).__name__}. Expected an object, the config.json of a PoolFormer."
        )
    if not is_timms(data) and data.get("model_type") != "poolformer":
        raise InputError(
            f"The config in {path} is of a {data.get('model_type')!r} model. Expected model_type 'poolformer', or "
            "timm's config.json."
        )
    return data


def network_of(files: ModelFiles, weights: WeightsFile) -> PoolFormerConfig:
    """The network that a model's files tell of: config.json where it speaks, names and shapes for the rest.

    Raises:
        ValueError: if they contradict each other, or are of no PoolFormer.
    """
    written = read_config(files.config) if files.config and _is_of_a_model(files.config) else _carried_config(weights)
    try:
        return _network(files, weights, written)
    except (TypeError, KeyError, AttributeError, OverflowError) as error:
        where = files.config or files.weights
        raise InputError(f"The config in {where} is malformed ({error}). Expected that of a PoolFormer.") from error


def _network(files: ModelFiles, weights: WeightsFile, written: Mapping[str, Any] | None) -> PoolFormerConfig:
    if written is not None and not is_timms(written):
        if "num_labels" not in written and not written.get("id2label"):
            written = {**written, "num_labels": plan_import(weights.tensors).detection.config.num_labels}
        try:
            return PoolFormerConfig.from_dict(written)
        except ValueError as error:
            raise InputError(f"The config in {files.config or files.weights} is malformed. {error}") from error
    config = plan_import(weights.tensors).detection.config
    if files.weights.name.startswith("metaformer_id_"):
        # The authors' release of this ablation is told from a PoolFormer by nothing but its name.
        config = dataclasses.replace(config, token_mixers=("identity",) * len(config.depths))
    if written is None:
        return config
    _refuse_other_functions(config, written, files.config)
    labels = _timms_labels(written)
    id2label = labels if labels and len(labels) == config.num_labels else None
    # timm's model pools first, whatever names its weights have: it reads the authors' names too.
    return dataclasses.replace(config, head_order=LAYOUTS["timm"].head_order or "", id2label=id2label)


def _timms_labels(data: Mapping[str, Any]) -> dict[int, str] | None:
    """Class names by index; None if timm's config.json names none."""
    cfg = data.get("pretrained_cfg") or data
    names = data.get("label_names") or cfg.get("label_names") or data.get("labels")
    texts = data.get("label_descriptions") or cfg.get("label_descriptions") or {}
    if not names:
        return None
    by_index = names.items() if isinstance(names, Mapping) else enumerate(names)
    return {int(index): str(texts.get(label, label)) for index, label in by_index}


def _is_of_a_model(path: Path) -> bool:
    """False for the config.json of something else: an object without any entry that a PoolFormer's could have."""
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return True  # which `read_config` tells
    names = {
        "architecture",
        "architectures",
        "model_type",
        *(field.name for field in dataclasses.fields(PoolFormerConfig)),
    }
    return not isinstance(data, dict) or not names.isdisjoint(data)


# Entries of timm's that change nothing at inference.
_TIMM_TRAINING = ("drop_rate", "drop_path_rate", "proj_drop_rate", "layer_scale_init_values")


def _refuse_other_functions(config: PoolFormerConfig, data: Mapping[str, Any], path: Path | None) -> None:
    """Raises where timm's config.json speaks of a model that computes something else than these arrays do here."""
    here = {
        "num_classes": config.num_labels,
        "global_pool": "avg",
        "in_chans": config.num_channels,
        "depths": list(config.depths),
        "dims": list(config.hidden_sizes),
    }
    said = {name: data[name] for name in ("num_classes", "global_pool") if name in data} | (
        data.get("model_args") or {}
    )
    wrong = [
        f"{name}={value!r}: expected {repr(here[name]) if name in here else 'no such entry'}"
        for name, value in said.items()
        if value is not None and value != here.get(name) and name not in _TIMM_TRAINING
    ]
    variant = published_variant(config)
    known = [f"poolformer_{name}" for name in ([variant] if variant else SIZES)]
    if (architecture := str(data["architecture"]).split(".")[0]) not in known:
        wrong.append(f"architecture={architecture!r}: expected {' or '.join(known)}")
    if wrong:
        raise InputError(
            f"timm's config in {path} is not of these weights, or of a network that is not here:\n  "
            + "\n  ".join(wrong)
        )


def _carried_config(weights: WeightsFile) -> dict[str, Any] | None:
    carried = weights.metadata.get(CARRIED_CONFIG)
    return _written(carried, weights.path) if carried else None

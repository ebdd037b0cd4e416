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

from poolformer_jax.config import PoolFormerConfig
from poolformer_jax.hub import NotInCache, Repository
from poolformer_jax.processor_config import FILE as PREPROCESSOR
from poolformer_jax.published import RESULTS, published_variant
from poolformer_jax.torch_weights.files import WeightsFile, WeightsFileError, is_index, read_index
from poolformer_jax.torch_weights.names import LAYOUTS
from poolformer_jax.torch_weights.transfer import plan_import

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
CARRIED_CONFIG = "poolformer_jax.config"
_ENDINGS = (".safetensors", ".pth.tar", ".pth", ".bin", ".pt")


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model.

    Args:
        weights: the weights, or the index of their shards.
        config: config.json; None if there is none.
    """

    weights: Path
    config: Path | None


def find_model_files(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> ModelFiles:
    """Finds the files of a model, and downloads them if `source` is a name on the Hub.

    Args:
        source: a folder, a weights file, or a name on the Hub ("sail/poolformer_s12").
        revision: branch, tag or commit on the Hub.
        cache_dir: the Hub's cache; by default where huggingface_hub keeps it (HF_HOME).
        local_files_only: whether to take what the cache has and ask nobody. HF_HUB_OFFLINE=1 does so too.
        token: for private models; by default the one that `hf auth login` stored.

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
    repository = Repository(
        str(source),
        (CONFIG, *WEIGHTS),
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        token=token,
    )
    return _on_hub(repository)


def _in_folder(folder: Path) -> ModelFiles:
    config = folder / CONFIG
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        files = sorted(path for path in folder.iterdir() if path.is_file())
        found = [path for path in files if is_index(path)] or [path for path in files if path.name.endswith(_ENDINGS)]
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ValueError(f"The folder {folder} has several weights files: {names}. Give the path of one of them.")
    if not found:
        raise FileNotFoundError(
            f"The folder {folder} holds no weights. Expected {WEIGHTS[0]}, or another weights file."
        )
    return ModelFiles(found[0], config if config.is_file() else None)


def _on_hub(repository: Repository) -> ModelFiles:
    config = repository.find(CONFIG)
    weights = repository.find(*WEIGHTS)
    if weights is None:
        raise FileNotFoundError(
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


@dataclass(frozen=True)
class WrittenConfig:
    """What a config.json says about a network.

    Args:
        dialect: "transformers" (and this package's own), or "timm".
        data: its entries.
    """

    dialect: str
    data: Mapping[str, Any]

    @property
    def id2label(self) -> dict[int, str] | None:
        """Class names by index; None if it names none."""
        if self.dialect == "transformers":
            labels = self.data.get("id2label")
            return {int(index): str(label) for index, label in labels.items()} if labels else None
        cfg = self.data.get("pretrained_cfg") or self.data
        names = self.data.get("label_names") or cfg.get("label_names") or self.data.get("labels")
        texts = self.data.get("label_descriptions") or cfg.get("label_descriptions") or {}
        if not names:
            return None
        by_index = names.items() if isinstance(names, Mapping) else enumerate(names)
        return {int(index): str(texts.get(label, label)) for index, label in by_index}


def read_config(path: Path) -> WrittenConfig:
    """Reads a config.json that is of a model.

    Raises:
        ValueError: if it is no JSON object, or of another kind of model.
    """
    return _written(path.read_text(encoding="utf-8", errors="replace"), path)


def _written(text: str, path: Path) -> WrittenConfig:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"The config in {path} is no JSON ({error}). Expected the config.json of a PoolFormer."
        ) from error
    if not isinstance(data, dict):
        raise ValueError(
            f"The config in {path} holds a {type(data).__name__}. Expected an object, the config.json of a PoolFormer."
        )
    if "architecture" in data:
        return WrittenConfig("timm", data)
    if data.get("model_type") != "poolformer":
        raise ValueError(
            f"The config in {path} is of a {data.get('model_type')!r} model. Expected model_type 'poolformer', or "
            "timm's config.json."
        )
    return WrittenConfig("transformers", data)


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
        raise ValueError(f"The config in {where} is malformed ({error}). Expected that of a PoolFormer.") from error


def _network(files: ModelFiles, weights: WeightsFile, written: WrittenConfig | None) -> PoolFormerConfig:
    if written is not None and written.dialect == "transformers":
        data = dict(written.data)
        if "num_labels" not in data and not data.get("id2label"):
            data["num_labels"] = plan_import(weights.tensors).detection.config.num_labels
        try:
            return PoolFormerConfig.from_dict(data)
        except ValueError as error:
            raise ValueError(f"The config in {files.config or files.weights} is malformed. {error}") from error
    config = plan_import(weights.tensors).detection.config
    if files.weights.name.startswith("metaformer_id_"):
        # The authors' release of this ablation is told from a PoolFormer by nothing but its name.
        config = dataclasses.replace(config, token_mixers=("identity",) * len(config.depths))
    if written is None:
        return config
    _refuse_other_functions(config, written.data, files.config)
    id2label = written.id2label if len(written.id2label or ()) == config.num_labels else None
    # timm's model pools first, whatever names its weights have: it reads the authors' names too.
    return dataclasses.replace(config, head_order=LAYOUTS["timm"].head_order or "", id2label=id2label)


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
    known = [f"poolformer_{name}" for name in ([variant] if variant else RESULTS)]
    if (architecture := str(data["architecture"]).split(".")[0]) not in known:
        wrong.append(f"architecture={architecture!r}: expected {' or '.join(known)}")
    if wrong:
        raise ValueError(
            f"timm's config in {path} is not of these weights, or of a network that is not here:\n  "
            + "\n  ".join(wrong)
        )


def _carried_config(weights: WeightsFile) -> WrittenConfig | None:
    carried = weights.metadata.get(CARRIED_CONFIG)
    return _written(carried, weights.path) if carried else None

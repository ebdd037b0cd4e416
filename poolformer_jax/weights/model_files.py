"""Finds a model's files, on the Hugging Face Hub or on disk.

Weights are looked for under the names that transformers, timm and this package give them, safetensors first.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from poolformer_jax.errors import InputError, MissingFileError
from poolformer_jax.files import is_file
from poolformer_jax.hub import CONFIG, WEIGHTS_ENDINGS, HubOptions, NotInCache, Repository, check_no_revision
from poolformer_jax.images import PREPROCESSOR_CONFIG
from poolformer_jax.weights.containers.files import is_index, read_index
from poolformer_jax.weights.published import AUTHORS_REPOSITORY, names_on_the_hub

# transformers would open model.safetensors with our names, and give all parameters random values.
OUR_WEIGHTS = "flax_model.safetensors"
# In the order of preference. An index names shards that lie beside it.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    OUR_WEIGHTS,
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model.pth",
    "model.pth.tar",
    "model.pth",
)


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model."""

    source: str  # what the caller gave: a folder, a file, or a name on the Hub
    weights: Path  # the weights, or the index of their shards
    config: Path | None  # config.json; None if it is missing
    not_in_cache: NotInCache | None = None  # set if the Hub may have a preprocessor_config.json, but could not be asked


def find_model_files(source: str | os.PathLike[str], **hub_options: Unpack[HubOptions]) -> ModelFiles:
    """Finds the files of a model, and downloads them if `source` is a name on the Hub.

    The authors keep the weights of the second paper in one repository: "sail/dl/caformer/caformer_s18.pth".

    Raises:
        MissingFileError: if there is no such model, or it has no weights.
        InputError: if a folder has several weights files, none with a standard name.
        MissingDependencyError: if the model is on the Hub and huggingface_hub is not installed.
    """
    path = Path(source).expanduser()
    if path.exists():
        check_no_revision(path, hub_options.get("revision"))
    if path.is_dir():
        path = _weights_in(path)
    elif not path.is_file():
        _check_meant_for_the_hub(str(source), path, hub_options)
        if str(source).startswith(f"{AUTHORS_REPOSITORY}/"):
            return _download_file(AUTHORS_REPOSITORY, str(source).removeprefix(f"{AUTHORS_REPOSITORY}/"), hub_options)
        return _download(Repository(str(source), (CONFIG, *WEIGHTS), **hub_options))
    config = path.with_name(CONFIG)
    return ModelFiles(str(source), path, config if is_file(config) else None)


def _check_meant_for_the_hub(source: str, path: Path, hub_options: HubOptions) -> None:
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
        if is_file(folder / name):
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
        model = folder / "model"
        if any((model / name).is_file() for name in WEIGHTS):  # the folder of a run of `python -m train`
            raise MissingFileError(f"The folder {folder} has no weights. Expected that of the model, {model}.")
        raise MissingFileError(f"The folder {folder} has no weights. Expected {', '.join(WEIGHTS)} or another name.")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise InputError(f"The folder {folder} has several weights files: {names}. Give the path of one of them.")
    return found[0]


def _download_file(name: str, file: str, hub_options: HubOptions) -> ModelFiles:
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

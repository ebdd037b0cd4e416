"""Models from anywhere into memory, and from memory into a folder.

Finding files and what they say of the network is in `model_files`, names and containers in `torch_weights`, what a
folder for each home of PoolFormer holds in `model_folder`. Here they meet the network, which may get a new head.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jaxtyping import PRNGKeyArray

from poolformer_jax.errors import InputError
from poolformer_jax.images.processor import PoolFormerImageProcessor
from poolformer_jax.network import (
    NETWORK,
    Parameter,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    initial_value,
    subtree,
)
from poolformer_jax.weights import from_torch_state_dict
from poolformer_jax.weights.containers.files import open_weights
from poolformer_jax.weights.folder import write_model
from poolformer_jax.weights.source import find_model_files, network_of
from poolformer_jax.weights.transfer import stored_views


def load_pretrained(
    source: str | os.PathLike[str],
    *,
    num_labels: int | None = None,
    reset_head: bool = False,
    key: PRNGKeyArray | None = None,
    dtype: Dtype = jnp.float32,
    use_ema: bool = False,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> tuple[PoolFormerForImageClassification, dict[str, Any]]:
    """A model and its weights, from the Hub, a folder or a file of any home of PoolFormer.

    Args:
        source: a name on the Hugging Face Hub ("sail/poolformer_s12", "timm/poolformer_s12.sail_in1k"), a folder, or
            a weights file (.safetensors, .bin, .pth, .pth.tar).
        num_labels: the number of classes wanted; None for the file's.
        reset_head: whether to begin a new head, with random weights, for `num_labels` classes.
        key: what the new head's weights are drawn from; None for `jax.random.key(0)`.
        dtype: type that the model computes in, float32 or bfloat16. Parameters are float32.
        use_ema: whether to take the moving average of the weights, where a training checkpoint holds one.
        revision: branch, tag or commit on the Hub.
        cache_dir: the Hub's cache; by default where huggingface_hub keeps it (HF_HOME).
        local_files_only: whether to take what the cache has and ask nobody.
        token: for private models on the Hub.

    Returns:
        The model, with the config that the files tell of, and variables `{"params": tree}` for `model.apply`.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if its files are damaged, hostile or of another network, if `num_labels` is not the file's, or if
            `key` is given and the head is kept.
    """
    if key is not None and not reset_head:
        raise InputError(
            "A key was given, and the head is the file's. Expected no key; pass reset_head=True to begin a new head."
        )
    hub = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
    files = find_model_files(source, **hub)
    weights = open_weights(files.weights, use_ema=use_ema)
    config, variables = from_torch_state_dict(weights.tensors, network_of(files, weights))
    if reset_head:
        config, params = _with_new_head(config, variables["params"], num_labels, key)
    else:
        params = variables["params"]
        _check_head(config, params, num_labels, files.weights)
    model = PoolFormerForImageClassification(config, dtype=dtype)
    _to_device(params)
    return model, {"params": params}


def _to_device(tree: dict[str, Any]) -> None:
    """Turns NumPy's leaves into jax's one by one, so that one of them at a time is in memory twice."""
    for name, value in tree.items():
        if isinstance(value, dict):
            _to_device(value)
        else:
            tree[name] = jax.device_put(value)


def _check_head(config: PoolFormerConfig, params: Mapping[str, Any], num_labels: int | None, path: Path) -> None:
    """Raises unless the file has the head that was asked for."""
    if "norm" not in params:
        raise InputError(
            f"{path} holds a backbone without final norm and head. Pass num_labels=... and reset_head=True for new "
            "ones, or take from_torch_state_dict(...) and PoolFormerModel for the backbone alone."
        )
    if num_labels not in (None, config.num_labels):
        raise InputError(
            f"{path} has a head for {config.num_labels} classes, and num_labels={num_labels} was asked for. Expected "
            f"{config.num_labels} or None; pass reset_head=True to begin a new head."
        )


def _with_new_head(
    config: PoolFormerConfig, params: Mapping[str, Any], num_labels: int | None, key: PRNGKeyArray | None
) -> tuple[PoolFormerConfig, dict[str, Any]]:
    """The network with a head as it starts; a norm, too, where there was none."""
    labels = config.num_labels if num_labels is None else num_labels
    config = dataclasses.replace(config, num_labels=labels, id2label=None)  # checks the number
    key = jax.random.key(0) if key is None else key
    fresh = jax.tree.map(
        lambda parameter: np.asarray(initial_value(key, parameter)),
        {name: branch for name, branch in subtree(config, NETWORK).items() if name in ("norm", "head")},
        is_leaf=lambda branch: isinstance(branch, Parameter),
    )
    return config, {**fresh, **{name: branch for name, branch in params.items() if name != "head"}}


def save_pretrained(
    folder: str | os.PathLike[str],
    model: PoolFormerForImageClassification,
    variables: Mapping[str, Any],
    layout: str = "jax",
    image_processor: PoolFormerImageProcessor | None = None,
) -> None:
    """Writes a model folder that `load_pretrained` and the layout's own home read, whole or not at all.

    Args:
        folder: where to; made if there is none. A model in it is replaced when all is written, its preprocessing too.
            A program that is killed in that moment leaves no weights there, rather than parts of two models.
        model: gives the config.
        variables: `{"params": tree}`.
        layout: "jax" (the tree's own names), "hf" (`transformers`' from_pretrained reads the folder), "timm"
            (`timm.create_model(..., checkpoint_path=folder/model.safetensors)`), or "sail" (`model.pth.tar` for
            torch.load and a strict load_state_dict).
        image_processor: the preprocessing to save with it; None for that of the published variant of this
            architecture, and for none where there is no such variant.

    Raises:
        ValueError: if the layout's model cannot compute this network, the variables are of another one, or the
            preprocessing makes another number of channels.
    """
    views = stored_views(model.config, variables, layout, classifier=True)
    write_model(folder, model.config, layout, (array for _, array in views), image_processor)

"""`load_pretrained` and `save_pretrained`: models from any source into memory, and from memory into a folder."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jaxtyping import PRNGKeyArray

from poolformer_jax.errors import InputError
from poolformer_jax.images import PoolFormerImageProcessor
from poolformer_jax.network import (
    NETWORK,
    Parameter,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    initial_value,
    leaves_by_path,
    subtree,
)
from poolformer_jax.process import process_of_jax
from poolformer_jax.weights.folder import write_model
from poolformer_jax.weights.source import OpenedModel, open_model
from poolformer_jax.weights.transfer import stored_views


def load_pretrained(
    source: str | os.PathLike[str],
    *,
    num_labels: int | None = None,
    reset_head: bool = False,
    key: PRNGKeyArray | None = None,
    dtype: Dtype = jnp.float32,
    config: PoolFormerConfig | None = None,
    variant: str | None = None,
    ignore: Sequence[str] = (),
    use_ema: bool = False,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    **changes: Any,
) -> tuple[PoolFormerForImageClassification, dict[str, Any]]:
    """Loads a model and its weights from the Hub, a folder or a file, in any of the PyTorch layouts or in ours.

    Args:
        source: a name on the Hugging Face Hub ("sail/poolformer_s12", "timm/poolformer_s12.sail_in1k"), a folder, or
            a weights file (.safetensors, .bin, .pth, .pth.tar). "sail/dl/caformer/caformer_s18.pth" is a file in the
            repository of the second paper's authors.
        num_labels: the expected number of classes; None for the number in the file.
        reset_head: replace the head by a new one with random weights, for `num_labels` classes. Of the MLP head of
            ConvFormer and CAFormer only the last layer is replaced, as in timm.
        key: random key for the weights of the new head; None for `jax.random.key(0)`.
        dtype: type that the model computes in, float32 or bfloat16. Parameters are float32.
        config: the network, for weights whose arrays do not determine it (`poolformer_ln_s12` has the names and shapes
            of s12); None to take it from config.json or from the weights.
        variant: or the name of a published network ("s12", "poolformer_ln_s12", "identityformer_s12").
        ignore: patterns ("criterion.*") of names in the weights file to leave out, as in the shell.
        use_ema: take the moving average of the weights from a training checkpoint.
        revision: branch, tag or commit on the Hub.
        cache_dir: the Hub's cache; by default huggingface_hub's (HF_HOME).
        local_files_only: use the cache without asking the Hub.
        token: for private models on the Hub.
        changes: fields of the config to change, which the parameters do not depend on: `id2label=names`,
            `drop_path_rate=0.1`.

    Returns:
        The model, with the config of the files, and variables `{"params": tree}` for `model.apply`; RandFormer's
        matrices are in the collection "constants" beside it.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if its files are damaged, hostile or of another network, if the file has another number of classes
            than `num_labels`, if `key` is given without `reset_head`, or if `changes` need other parameters.
    """
    if key is not None and not reset_head:
        raise InputError(
            "A key was given without reset_head=True, and would have no effect. Expected no key, or reset_head=True."
        )
    model = open_model(
        source,
        config=config,
        variant=variant,
        ignore=ignore,
        use_ema=use_ema,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        token=token,
    )
    if num_labels is None and changes.get("id2label") is not None:
        num_labels = len(changes["id2label"])
    module, variables = build_model(model, num_labels=num_labels, reset_head=reset_head, key=key, dtype=dtype)
    if changes:
        module = module.clone(config=module.config.with_changes(**changes))
        leaves_by_path(module.config, variables)
    return module, variables


def build_model(
    opened: OpenedModel,
    *,
    num_labels: int | None = None,
    reset_head: bool = False,
    key: PRNGKeyArray | None = None,
    dtype: Dtype = jnp.float32,
) -> tuple[PoolFormerForImageClassification, dict[str, Any]]:
    """As `load_pretrained`, of a model that `open_model` has opened."""
    if not reset_head:
        _check_head(opened, num_labels)
    config, variables = opened.config, opened.read_variables()
    if reset_head:
        config, variables["params"] = _with_new_head(config, variables["params"], num_labels, key)
    process_of_jax()  # a classifier that is made in a process forked from this one would hang, and says so
    _to_device(variables)
    return PoolFormerForImageClassification(config, dtype=dtype), variables


def _to_device(tree: dict[str, Any]) -> None:
    """Moves NumPy arrays to the device one by one, so that only one of them is in memory twice."""
    for name, value in tree.items():
        if isinstance(value, dict):
            _to_device(value)
        else:
            tree[name] = jax.device_put(value)


def _check_head(opened: OpenedModel, num_labels: int | None) -> None:
    """Raises unless the file has a head, for `num_labels` classes."""
    path, found = opened.files.weights, opened.config.num_labels
    if not opened.plan.has_classifier:
        raise InputError(
            f"{path} is a backbone without final norm and head. Pass num_labels=... and reset_head=True for new ones, "
            "or use FlaxPoolFormerModel.from_pretrained(...) for the backbone alone."
        )
    if num_labels not in (None, found):
        raise InputError(
            f"{path} has a head for {found} classes, and num_labels={num_labels}. Expected {found} or None; pass "
            "reset_head=True for a new head."
        )


def _with_new_head(
    config: PoolFormerConfig, params: Mapping[str, Any], num_labels: int | None, key: PRNGKeyArray | None
) -> tuple[PoolFormerConfig, dict[str, Any]]:
    """The network with a newly initialised head, and with a new norm if there was none.

    Of an MLP head only the last layer is new, as in timm.
    """
    labels = config.num_labels if num_labels is None else num_labels
    config = dataclasses.replace(config, num_labels=labels, id2label=None)  # checks the number
    key = jax.random.key(0) if key is None else key
    # The hidden layer of an MLP head has a key of its own, so that the layers do not start with the same numbers.
    fresh = jax.tree.map_with_path(
        lambda path, parameter: np.asarray(
            initial_value(jax.random.fold_in(key, 1) if jax.tree_util.DictKey("fc1") in path else key, parameter)
        ),
        {name: branch for name, branch in subtree(config, NETWORK).items() if name in ("norm", "head")},
        is_leaf=lambda branch: isinstance(branch, Parameter),
    )
    if "head" in fresh:
        fresh["head"] |= kept_of_head(params.get("head", {}))
    return config, {**fresh, **{name: branch for name, branch in params.items() if name != "head"}}


def kept_of_head(head: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a head that do not depend on the classes: the hidden layer of an MLP head, and its norm."""
    return {name: head[name] for name in ("fc1", "norm") if name in head}


def save_pretrained(
    folder: str | os.PathLike[str],
    model: PoolFormerForImageClassification,
    variables: Mapping[str, Any],
    layout: str = "jax",
    image_processor: PoolFormerImageProcessor | None = None,
    metrics: Mapping[str, int | float] | None = None,
) -> None:
    """Writes a model folder, whole or not at all, that `load_pretrained` and the library of the layout can read.

    Its README.md is a model card for the Hugging Face Hub. A README.md that you have written or edited is kept.

    Args:
        folder: the folder, created if needed. A model in it, with its preprocessing, is replaced once everything has
            been written. If the program is killed during the replacement, the folder has no weights, and never parts
            of two models.
        model: the model; only its config is used.
        variables: as `load_pretrained` returns them.
        layout: "jax" (paths of the parameter tree), "hf" (for `transformers`' from_pretrained), "timm" (for
            `timm.create_model(..., checkpoint_path=folder/model.safetensors)`), or "sail" (`model.pth.tar` for
            torch.load and a strict load_state_dict). transformers has no network of the second paper, and timm has
            no IdentityFormer and no RandFormer.
        image_processor: the preprocessing to save; None for that of the published variant of this architecture, or
            for none if there is no such variant.
        metrics: measured quality of the weights by name, for the model card: {"top-1 accuracy, %": 77.2}.

    Raises:
        ValueError: if the layout's model cannot compute this network, the variables do not match the config, or the
            preprocessing makes another number of channels.
    """
    views = stored_views(model.config, variables, layout, classifier=True)
    write_model(folder, model.config, layout, (array for _, array in views), image_processor, metrics)

"""The linen modules together with their parameters, with the interface of FlaxPreTrainedModel in transformers 4.

Source: transformers 4.57, modeling_flax_utils.py and models/vit/modeling_flax_vit.py, as documented. The modules stay
pure functions of parameters and pixels; a model here only holds parameters, and reads and writes them.
"""

import contextlib
import os
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from flax.typing import Dtype
from jaxtyping import PRNGKeyArray

from poolformer_jax import hub
from poolformer_jax.errors import InputError
from poolformer_jax.hub import NotInCache
from poolformer_jax.images import PoolFormerImageProcessor
from poolformer_jax.network import (
    CONSTANTS,
    NETWORK,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    PoolFormerModel,
    count_parameters,
    describe_network,
    leaves_by_path,
    subtree,
)
from poolformer_jax.weights.folder import write_model
from poolformer_jax.weights.pretrained import kept_of_head
from poolformer_jax.weights.source import OpenedModel, open_model
from poolformer_jax.weights.transfer import stored_views

Params = dict[str, Any]
_Model = TypeVar("_Model", bound="_FlaxPoolFormer")


class _FlaxPoolFormer:
    """What the two models share; `module` is the linen module."""

    module_class: ClassVar[type[PoolFormerModel] | type[PoolFormerForImageClassification]]
    _has_head: ClassVar[bool]

    def __init__(
        self,
        config: PoolFormerConfig,
        input_shape: tuple[int, ...] | None = None,
        seed: int = 0,
        dtype: Dtype = jnp.float32,
        _do_init: bool = True,
    ) -> None:
        if count_parameters(config, CONSTANTS):
            raise InputError(
                f"{type(self).__name__} holds trained parameters only, and this network has matrices beside them that "
                "are not trained (RandFormer). Expected another network; load_pretrained returns this one."
            )
        side = config.image_size or config.smallest_side
        self.config, self.dtype = config, dtype
        self.input_shape = input_shape or (1, side, side, config.num_channels)
        self.module = self.module_class(config, dtype=dtype)
        self._image_processor: PoolFormerImageProcessor | None = None  # the one saved with the weights
        self._params: Params | None = None
        if _do_init:
            self._params = self.init_weights(jax.random.key(seed), self.input_shape)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({describe_network(self.config)})"

    @classmethod
    def from_pretrained(
        cls: type[_Model],
        source: str | os.PathLike[str],
        *,
        config: PoolFormerConfig | None = None,
        variant: str | None = None,
        ignore: Sequence[str] = (),
        use_ema: bool = False,
        dtype: Dtype = jnp.float32,
        ignore_mismatched_sizes: bool = False,
        seed: int = 0,
        _do_init: bool = True,
        from_pt: bool = False,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **changes: Any,
    ) -> Any:
        """Loads a model from the Hub, a folder or a file, in any of the layouts that `load_pretrained` reads.

        Args:
            source: a name on the Hugging Face Hub ("sail/poolformer_s12"), a folder, or a weights file.
            config: the architecture; None for that of the files.
            variant: as in `load_pretrained`.
            ignore: as in `load_pretrained`.
            use_ema: as in `load_pretrained`.
            dtype: type that activations are computed in, float32 or bfloat16.
            ignore_mismatched_sizes: start with a new head if the file's has another number of classes.
            seed: of the random parameters of a new head.
            _do_init: False returns the model without parameters, and the parameters.
            from_pt: has no effect, because PyTorch's files are recognised.
            revision: branch, tag or commit on the Hub.
            cache_dir: the Hub's cache; by default huggingface_hub's (HF_HOME).
            local_files_only: use the cache without asking the Hub.
            token: for private models on the Hub.
            changes: fields of the config to change: `num_labels=37`, `id2label=names`, `drop_path_rate=0.1`.

        Returns:
            The model; with `_do_init=False` the model and its parameters.

        Raises:
            FileNotFoundError: if there is no such model.
            ValueError: if its files are damaged or of another network, or have a head for another number of classes.
        """
        if (torch_dtype := changes.pop("torch_dtype", None)) not in (None, "auto"):
            dtype = jnp.dtype(str(torch_dtype).removeprefix("torch."))
        opened = open_model(
            source,
            config=config,
            variant=variant,
            ignore=ignore,
            use_ema=use_ema,
            any_classes=True,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
        model = cls((config or opened.config).with_changes(**changes), dtype=dtype, _do_init=False)
        params = jax.tree.map(jnp.asarray, model._read_params(opened, ignore_mismatched_sizes, seed))
        with contextlib.suppress(NotInCache):
            model._image_processor = opened.saved_image_processor
        if not _do_init:
            return model, params
        model.params = params
        return model

    def _read_params(self, opened: OpenedModel, ignore_mismatched_sizes: bool, seed: int) -> Params:
        """The parameters in the files; those that the files lack, or have for other classes, are random."""
        source, wanted = opened.files.source, subtree(self.config, NETWORK, classifier=self._has_head)
        params: Params = opened.read_variables()["params"]
        for name in {"norm", "head"} - wanted.keys():  # a backbone in a classifier's file
            params.pop(name, None)
        if "head" in params and (wrong := _other_shapes(params["head"], wanted["head"])):
            if not ignore_mismatched_sizes:
                raise InputError(
                    f"{source} has a head for {opened.config.num_labels} classes, and the config has num_labels="
                    f"{self.config.num_labels} ({wrong}). Pass ignore_mismatched_sizes=True to start with a new head."
                )
            params["head"] = kept_of_head(params["head"])
            warnings.warn(f"The head is new and must be trained: {source} has another one ({wrong}).", stacklevel=3)
        elif missing := sorted(wanted.keys() - params.keys()):
            warnings.warn(f"{' and '.join(missing)} are new and must be trained: {source} lacks them.", stacklevel=3)
        if wanted.keys() - params.keys() or wanted.get("head", {}).keys() - params.get("head", {}).keys():
            return self.init_weights(jax.random.key(seed), self.input_shape, params)
        return params

    @property
    def params(self) -> Params:
        """The parameters that calls use by default, a nested dictionary as the module's `variables["params"]`.

        Raises ValueError if the model was made with `_do_init=False`; when set, for parameters of another network.
        """
        if self._params is None:
            raise InputError("The model has no parameters, because of _do_init=False. Pass params=... to the call.")
        return self._params

    @params.setter
    def params(self, params: Mapping[str, Any]) -> None:
        leaves_by_path(self.config, {"params": params}, classifier=self._has_head)
        self._params = dict(params)

    def init_weights(
        self, rng: PRNGKeyArray, input_shape: tuple[int, ...], params: Mapping[str, Any] | None = None
    ) -> Params:
        """Random parameters; those in `params` are kept.

        Args:
            rng: random key.
            input_shape: [batch, height, width, channels].
            params: parameters of this network, some of which may be missing.
        """
        random = self.module.lazy_init(rng, jax.ShapeDtypeStruct(input_shape, jnp.float32))["params"]
        return dict(unflatten_dict({**flatten_dict(random), **flatten_dict(params or {})}))

    def to_bf16(self, params: Mapping[str, Any], mask: Mapping[str, Any] | None = None) -> Params:
        """A copy of `params` in bfloat16; only the leaves where `mask`, a tree of booleans, is True."""
        return _cast(params, jnp.bfloat16, mask)

    def to_fp16(self, params: Mapping[str, Any], mask: Mapping[str, Any] | None = None) -> Params:
        """As `to_bf16`, in float16."""
        return _cast(params, jnp.float16, mask)

    def to_fp32(self, params: Mapping[str, Any], mask: Mapping[str, Any] | None = None) -> Params:
        """As `to_bf16`, in float32."""
        return _cast(params, jnp.float32, mask)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        params: Mapping[str, Any] | None = None,
        push_to_hub: bool = False,
        *,
        layout: str = "jax",
        image_processor: PoolFormerImageProcessor | None = None,
        metrics: Mapping[str, int | float] | None = None,
        **hub_options: Any,
    ) -> None:
        """Writes a model folder, as `poolformer_jax.save_pretrained`.

        Args:
            folder: the folder, created if needed.
            params: the parameters; None for the model's.
            push_to_hub: also upload it, to `repo_id` of `hub_options` or a repository with the folder's name.
            layout: "jax", or "hf" for a folder that PoolFormer in `transformers` reads.
            image_processor: the preprocessing to save; None for the one that `from_pretrained` found, or else that of
                the published variant of this architecture.
            metrics: measured quality of the weights by name, for the model card: {"top-1 accuracy, %": 77.2}.
            hub_options: as in `push_to_hub`.
        """
        params = self.to_fp32(self.params if params is None else params)
        image_processor = image_processor or self._image_processor
        views = stored_views(self.config, {"params": params}, layout, classifier=self._has_head)
        arrays = (array for _, array in views)
        write_model(folder, self.config, layout, arrays, image_processor, metrics, classifier=self._has_head)
        if push_to_hub:
            repo_id = hub_options.pop("repo_id", Path(folder).name)
            saved: dict[str, Any] = {"layout": layout, "image_processor": image_processor, "metrics": metrics}
            self.push_to_hub(repo_id, params, **saved, **hub_options)

    def push_to_hub(
        self,
        repo_id: str,
        params: Mapping[str, Any] | None = None,
        *,
        layout: str = "jax",
        image_processor: PoolFormerImageProcessor | None = None,
        metrics: Mapping[str, int | float] | None = None,
        **hub_options: Any,
    ) -> str:
        """Uploads to the Hugging Face Hub what `save_pretrained` writes.

        Args:
            repo_id: "owner/name".
            params: the parameters; None for the model's.
            layout: as in `save_pretrained`.
            image_processor: as in `save_pretrained`.
            metrics: as in `save_pretrained`.
            hub_options: private, token, commit_message, revision, create_pr, as in huggingface_hub.

        Returns:
            The address of the commit.
        """
        saved: dict[str, Any] = {"layout": layout, "image_processor": image_processor, "metrics": metrics}
        return hub.push_to_hub(repo_id, partial(self.save_pretrained, params=params, **saved), **hub_options)

    def __call__(
        self,
        pixel_values: Any,
        params: Mapping[str, Any] | None = None,
        dropout_rng: PRNGKeyArray | None = None,
        train: bool = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        labels: Any = None,
    ) -> Any:
        """The module's output for a batch of images, compiled for every new shape.

        Args:
            pixel_values: [batch, height, width, num_channels], normalised.
            params: parameters to use instead of the model's.
            dropout_rng: random key for dropout and drop path.
            train: apply dropout and drop path.
            output_hidden_states: also return the feature map of every stage; None for the config's choice.
            return_dict: False returns the output's `to_tuple()`; None for the config's choice.
            labels: as in `PoolFormerForImageClassification`, for a loss; of the classifier only.
        """
        config = self.config
        output = _apply(
            self.module,
            self.params if params is None else params,
            jnp.asarray(pixel_values),
            {} if labels is None else {"labels": jnp.asarray(labels)},
            {} if dropout_rng is None else {"dropout": dropout_rng},
            train,
            config.output_hidden_states if output_hidden_states is None else output_hidden_states,
        )
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class FlaxPoolFormerModel(_FlaxPoolFormer):
    """The backbone with its parameters. Pixels and feature maps are channels last, [batch, height, width, channels].

    Args:
        config: the architecture.
        input_shape: shape of a batch of pixels; by default the smallest one.
        seed: of the random parameters.
        dtype: type that activations are computed in, float32 or bfloat16. Parameters are float32.
        _do_init: draw random parameters. Without it `params` must be passed to every call.
    """

    module_class = PoolFormerModel
    _has_head = False


class FlaxPoolFormerForImageClassification(_FlaxPoolFormer):
    """The classifier with its parameters. The arguments are those of `FlaxPoolFormerModel`."""

    module_class = PoolFormerForImageClassification
    _has_head = True


@partial(jax.jit, static_argnums=(0, 5, 6))
def _apply(
    module: PoolFormerModel | PoolFormerForImageClassification,
    params: Mapping[str, Any],
    pixel_values: Any,
    labels: dict[str, Any],
    rngs: dict[str, Any],
    train: bool,
    output_hidden_states: bool,
) -> Any:
    output: Any = module.apply({"params": params}, pixel_values, **labels, train=train, rngs=rngs)
    return output if output_hidden_states else output.replace(hidden_states=None)


def _cast(params: Mapping[str, Any], dtype: Dtype, mask: Mapping[str, Any] | None) -> Params:
    chosen = jax.tree.map(lambda _: True, params) if mask is None else mask
    cast = jax.tree.map(lambda leaf, choose: jnp.asarray(leaf, dtype) if choose else leaf, params, chosen)
    return dict(cast)


def _other_shapes(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The arrays of a head that have another shape, with both shapes; empty if there are none."""
    given, expected = flatten_dict(found, sep="/"), flatten_dict(wanted, sep="/")
    pairs = [(name, np.shape(given.get(name)), tuple(expected[name].shape)) for name in sorted(expected)]
    return ", ".join(f"head/{name} {list(has)} instead of {list(want)}" for name, has, want in pairs if has != want)

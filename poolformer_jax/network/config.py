"""What a MetaFormer is: one frozen value.

Field names are those of `transformers` where it has one, so that a `config.json` from the Hub is read as it is.
Sources: arXiv 2111.11418 and 2210.13452; sail-sg/poolformer, models/poolformer.py and models/metaformer.py;
sail-sg/metaformer, metaformer_baselines.py; transformers, configuration_poolformer.py.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar, no_type_check

from poolformer_jax.errors import InputError, MissingFileError
from poolformer_jax.fields import check_rules, convert_fields
from poolformer_jax.files import read_json
from poolformer_jax.hub import CONFIG, Repository, SavedAsJson, check_no_revision
from poolformer_jax.network.config_arguments import arguments_of, check_architecture, takes_arguments_of_transformers
from poolformer_jax.network.config_fields import FIELD_TYPES, rules
from poolformer_jax.network.variants import VARIANTS

_Config = TypeVar("_Config", bound="MetaFormerConfig")


@takes_arguments_of_transformers
@dataclasses.dataclass(frozen=True)
class MetaFormerConfig(SavedAsJson):
    """A MetaFormer's architecture; hashable, and checked when it is made.

    The constructor also takes `label2id`, which names the classes if `id2label` does not, `num_encoder_blocks`, the
    number of stages, and arguments that have no effect in transformers either, such as `patch_size`. The defaults are
    those of the first paper's PoolFormer-S12; `from_variant` makes every published network.

    Args:
        num_channels: channels of the input image.
        depths: number of blocks per stage. Its length is the number of stages.
        hidden_sizes: channels per stage.
        mlp_ratio: hidden channels of the MLP, as a multiple of the stage's channels.
        pool_size: window of the pooling token mixer, in pixels of the feature map; odd.
        patch_sizes: kernel of the stem and of each downsampling convolution, in pixels.
        strides: their strides; the product is the stride of the whole network.
        padding: their explicit zero padding on every side. JAX's "SAME" is another function.
        drop_path_rate: probability of dropping a sample's residual branch in the LAST block; it grows linearly from 0
            over all blocks.
        hidden_act: activation of the MLP, a key of `functional.ACTIVATIONS`; "gelu" is the exact erf form, and
            "star_relu" has a learnt scale and bias.
        use_layer_scale: whether every residual branch has a learnt scale per channel.
        layer_scale_init_value: its initial value.
        num_labels: classes of the head; 0 means no head; the pooled features are returned as logits.
        id2label: class names by index, for every index below `num_labels`, or a list of them; None if unknown. Without
            `num_labels` they also set the number of classes.
        dropout_rate: dropout after both layers of the MLP.
        token_mixers: one name per stage, of `parameter_table.MIXER_PARAMETERS`.
        norm: "group_norm" (one group over height, width and channels) or "layer_norm" (over channels at each position,
            as in the ablations with attention).
        head_order: "norm_pool" (sail and transformers: normalise the map, then average) or "pool_norm" (timm: average,
            then LayerNorm with epsilon 1e-6; also every network of the second paper).
        position_embeddings: per stage, whether a learnt position embedding is added to the stage's input.
        image_size: height and width in pixels that position embeddings, "spatial_fc" and "random" are made for; None
            if the network accepts any size. Without position embeddings these mixers also take other shapes whose
            feature maps have as many positions.
        problem_type: what the loss and the probabilities are for, "regression", "single_label_classification" or
            "multi_label_classification"; None for a single label per
            image, or for regression if `num_labels` is 1.
        output_hidden_states: whether `FlaxPoolFormerModel` and its classifier return the feature maps by default.
        return_dict: whether they return a ModelOutput by default, or a tuple.
        norm_bias: whether the blocks' norms have a bias.
        norm_epsilon: epsilon of the blocks' norms, and with "norm_pool" of the final norm.
        downsample_norm: whether the stem is followed, and each downsampling convolution preceded, by a LayerNorm over
            channels with epsilon 1e-6 and no bias.
        mlp_bias: whether the MLP's layers have a bias.
        attention_bias: whether the projection of the "attention" mixer has a bias.
        residual_scale_init_values: per stage the initial value of a learnt scale per channel on the trunk of every
            residual connection, `scale * x + branch`, or None in stages without one; None if no stage has one.
        head: "linear", or "mlp": a dense layer to four times the channels, squared ReLU, LayerNorm, a dense layer.
        head_norm_epsilon: epsilon of the LayerNorm inside the "mlp" head: 1e-5 in the authors' code, 1e-6 in timm.
        head_dropout_rate: dropout before the head's last dense layer.
        convolution_init: initial values of the stem and the downsampling convolutions: "torch" for PyTorch's default,
            "normal" for a standard deviation of 0.02 and biases of 0.

    Raises:
        ValueError: naming every unknown argument, or every field of a wrong type or out of range, with the value given
            and what was expected.
    """

    file_name: ClassVar[str] = CONFIG

    num_channels: int = 3
    depths: tuple[int, ...] = (2, 2, 6, 2)
    hidden_sizes: tuple[int, ...] = (64, 128, 320, 512)
    mlp_ratio: float = 4.0
    pool_size: int = 3
    patch_sizes: tuple[int, ...] = (7, 3, 3, 3)
    strides: tuple[int, ...] = (4, 2, 2, 2)
    padding: tuple[int, ...] = (2, 1, 1, 1)
    drop_path_rate: float = 0.0
    hidden_act: str = "gelu"
    use_layer_scale: bool = True
    layer_scale_init_value: float = 1e-5
    num_labels: int = 1000
    id2label: Mapping[int, str] | None = None
    dropout_rate: float = 0.0
    token_mixers: tuple[str, ...] = ("pooling",) * 4
    norm: str = "group_norm"
    head_order: str = "norm_pool"
    position_embeddings: tuple[bool, ...] = (False,) * 4
    image_size: int | None = None
    problem_type: str | None = None
    output_hidden_states: bool = False
    return_dict: bool = True
    norm_bias: bool = True
    norm_epsilon: float = 1e-5
    downsample_norm: bool = False
    mlp_bias: bool = True
    attention_bias: bool = True
    residual_scale_init_values: tuple[float | None, ...] | None = None
    head: str = "linear"
    head_norm_epsilon: float = 1e-5
    head_dropout_rate: float = 0.0
    convolution_init: str = "torch"

    def __post_init__(self) -> None:
        convert_fields(self, FIELD_TYPES)
        check_rules(self, rules(self))

    @property
    def label2id(self) -> dict[str, int] | None:
        """Class indices by name; of classes with the same name, the last one. None without `id2label`."""
        return None if self.id2label is None else {label: index for index, label in sorted(self.id2label.items())}

    @property
    def num_encoder_blocks(self) -> int:
        """The number of stages."""
        return len(self.depths)

    @property
    def mlp_hidden_sizes(self) -> tuple[int, ...]:
        """Hidden channels of the MLP per stage."""
        return tuple(int(channels * self.mlp_ratio) for channels in self.hidden_sizes)

    @property
    def total_stride(self) -> int:
        """Input pixels per pixel of the last feature map."""
        return math.prod(self.strides)

    @property
    def smallest_side(self) -> int:
        """The smallest input side: the total stride, or more if a feature map would have no pixel otherwise."""
        side = 1
        for patch, stride, pad in zip(self.patch_sizes[::-1], self.strides[::-1], self.padding[::-1]):
            side = max(1, (side - 1) * stride + patch - 2 * pad)
        return max(side, self.total_stride)

    def feature_sizes(self, image_size: int) -> tuple[int, ...]:
        """The side of every stage's feature map for an input side of `image_size` pixels."""
        sizes: list[int] = []
        for patch, stride, pad in zip(self.patch_sizes, self.strides, self.padding):
            sizes.append(((sizes[-1] if sizes else image_size) + 2 * pad - patch) // stride + 1)
        return tuple(sizes)

    @classmethod
    def from_variant(cls: type[_Config], name: str, **changes: Any) -> _Config:
        """The published network `name` ("s12", "caformer_s18", ..., or an ablation), with `changes` to its fields.

        Raises:
            ValueError: if there is no such variant, or a name in `changes` is not a field.
        """
        key = name.removeprefix("poolformer_")
        if key not in VARIANTS:
            raise InputError(f"There is no variant {name!r}. Expected one of: {', '.join(VARIANTS)}.")
        return cls(**{**VARIANTS[key], **changes})

    @classmethod
    def from_pretrained(
        cls: type[_Config],
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **changes: Any,
    ) -> _Config:
        """Reads the `config.json` of a model; no weights.

        Args:
            source: a name on the Hugging Face Hub ("sail/poolformer_s12"), a folder, or a file.
            revision: branch, tag or commit on the Hub.
            cache_dir: the Hub's cache; by default huggingface_hub's (HF_HOME).
            local_files_only: use the cache without asking the Hub.
            token: for private models on the Hub.
            changes: as in `with_changes`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: as `from_dict`; also for timm's config.json, which does not describe the layers.
        """
        path = Path(source).expanduser()
        if path.exists():
            check_no_revision(path, revision)
        if path.is_dir():
            path = path / CONFIG
        elif not path.exists():
            repository = Repository(
                str(source),
                (CONFIG,),
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                token=token,
            )
            path = repository.find(CONFIG) or path / CONFIG
        if not path.is_file():
            raise MissingFileError(f"There is no {path}. Expected the {CONFIG} of a PoolFormer or MetaFormer.")
        data = read_json(path, f"an object, the {CONFIG} of a PoolFormer or MetaFormer")
        return cls.from_dict(data, **changes)

    @classmethod
    def from_json_file(cls: type[_Config], file: str | os.PathLike[str]) -> _Config:
        """Reads a `config.json`; the errors are those of `from_pretrained`."""
        return cls.from_pretrained(file)

    @classmethod
    def from_dict(cls: type[_Config], data: Mapping[str, Any], **changes: Any) -> _Config:
        """Reads what `to_dict` wrote, or the `config.json` of a PoolFormer from `transformers`.

        If `model_type` is given, unknown entries are ignored as other models' in `transformers`. As there, the number
        of labels is 2 in a file of `transformers` that gives neither a number nor names. Keyword arguments are those of
        `with_changes`.

        Raises:
            ValueError: if `data` describes another architecture, or if a field is out of range.
        """
        check_architecture(data)
        known = arguments_of(cls)
        arguments = {name: value for name, value in data.items() if name in known or "model_type" not in data}
        if not (labels := arguments.get("id2label")):
            arguments.pop("id2label", None)
            if "transformers_version" in data:
                arguments.setdefault("num_labels", 2)
        elif isinstance(labels, Mapping):
            arguments["id2label"] = {index: str(label) for index, label in labels.items()}
        return cls(**arguments).with_changes(**changes)

    def with_changes(self: _Config, **changes: Any) -> _Config:
        """A copy with other fields, as `from_pretrained(name, **changes)` of `transformers` changes a config.

        New class names set `num_labels`. A new `num_labels` without names removes the old names.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if changes.keys() & {"id2label", "label2id"} or changes.get("num_labels", self.num_labels) != self.num_labels:
            del fields["id2label"], fields["num_labels"]
        return type(self)(**{**fields, **changes})

    def to_dict(self) -> dict[str, Any]:
        """All fields as values for JSON, with the entries that `transformers` needs to read them.

        `model_type` is "metaformer" for networks of the second paper, which the PoolFormer of `transformers` is not.
        """
        data: dict[str, Any] = {"model_type": "poolformer", "architectures": ["PoolFormerForImageClassification"]}
        if _needs_second_paper(self):
            data = {"model_type": "metaformer", "architectures": ["MetaFormerForImageClassification"]}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in _WRITTEN_IF_SET or value != field.default:
                data[field.name] = list(value) if isinstance(value, tuple) else value
        data["num_encoder_blocks"] = self.num_encoder_blocks
        if self.id2label is not None:
            data["id2label"] = {str(index): label for index, label in sorted(self.id2label.items())}
            data["label2id"] = self.label2id
        return data

    def to_json_string(self) -> str:
        """The text of `config.json`."""
        return json.dumps(self.to_dict(), indent=2) + "\n"


# The config checks its fields itself, with better messages than the annotations' checker of the tests.
no_type_check(MetaFormerConfig.__init__)

# MetaFormer is the class of networks of both papers. The PoolFormer names are the API of transformers, which has the
# first paper's networks only; code that was written for it stays valid for the whole class.
PoolFormerConfig = MetaFormerConfig

# The fields that came with the second paper: those that change the function, and the others.
_SECOND_PAPER = (
    *("norm_bias", "norm_epsilon", "downsample_norm", "mlp_bias", "attention_bias", "residual_scale_init_values"),
    "head",
)
_SECOND_PAPER_SETTINGS = ("head_norm_epsilon", "head_dropout_rate", "convolution_init")
# Left out of config.json if they have their default value.
_WRITTEN_IF_SET = (
    *("id2label", "problem_type", "output_hidden_states", "return_dict"),
    *(*_SECOND_PAPER, *_SECOND_PAPER_SETTINGS),
)


def _needs_second_paper(config: MetaFormerConfig) -> bool:
    """True if code that has only the first paper's networks would compute another function."""
    fields = any(getattr(config, name) != getattr(MetaFormerConfig, name) for name in _SECOND_PAPER)
    return fields or config.hidden_act == "star_relu" or not {"random", "sep_conv"}.isdisjoint(config.token_mixers)

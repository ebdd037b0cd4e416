"""What a MetaFormer is: one frozen value.

Field names are those of `transformers` where it has one, so that a `config.json` from the Hub is read as it is.
Sources: arXiv 2111.11418 and 2210.13452; sail-sg/poolformer, models/poolformer.py and models/metaformer.py;
sail-sg/metaformer, metaformer_baselines.py; transformers, configuration_poolformer.py.
"""

import dataclasses
import difflib
import functools
import json
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, no_type_check

from poolformer_jax.errors import InputError, MissingFileError
from poolformer_jax.fields import (
    BOOLEAN,
    INTEGER,
    NUMBER,
    STRING,
    FieldType,
    FrozenMapping,
    check_rules,
    convert_fields,
    optional,
    sequence_of,
)
from poolformer_jax.files import read_json, write_json
from poolformer_jax.hub import Repository, push_to_hub
from poolformer_jax.messages import first_few, printable, short_repr
from poolformer_jax.network.parameter_table import MIXER_PARAMETERS
from poolformer_jax.network.variants import VARIANTS

# The keys of `functional.ACTIVATIONS`, `functional.NORMS`, and the orders that `heads.classify` knows.
# The activations are those of transformers without parameters of their own (all but prelu and xielu), and StarReLU.
HIDDEN_ACTS = (
    *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh"),
    *("gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2"),
    *("relu6", "sigmoid", "silu", "sqrtsoftplus", "star_relu", "swish", "tanh"),
)
NORMS = ("group_norm", "layer_norm")
HEAD_ORDERS = ("norm_pool", "pool_norm")
HEADS = ("linear", "mlp")
CONVOLUTION_INITS = ("torch", "normal")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

CONFIG = "config.json"
# A config.json is a small file: what it asks for is bounded before any work is done.
_MOST_LABELS, _MOST_BLOCKS, _MOST_CHANNELS, _LARGEST_KERNEL, _LARGEST_IMAGE = 1_000_000, 10_000, 65_536, 1_024, 16_384
_MOST_POSITIONS = 16_384  # of a mixer that has a parameter for every pair of positions

_Config = TypeVar("_Config", bound="MetaFormerConfig")
_Class = TypeVar("_Class")

# Arguments of transformers' PoolFormerConfig that are accepted and have no effect. There they have none on a PoolFormer
# either, but for three: `dtype` is an argument of the models here, random parameters are drawn as the authors draw them
# (`initializer_range`), and `architectures` is checked in a config.json only.
WITHOUT_EFFECT = {
    *("_commit_hash", "_name_or_path", "architectures", "attn_implementation", "chunk_size_feed_forward", "dtype"),
    *("initializer_range", "is_encoder_decoder", "model_type", "name_or_path", "output_attentions", "patch_size"),
    *("stride", "torch_dtype", "transformers_version", "use_cache"),
}


def _with_arguments_of_transformers(cls: type[_Class]) -> type[_Class]:
    """Lets the constructor take arguments of transformers that are not fields: see `_fields_of`."""
    make = cls.__init__

    @functools.wraps(make)
    def __init__(self: Any, *values: Any, **arguments: Any) -> None:
        make(self, *values, **_fields_of(arguments))

    setattr(cls, "__init__", __init__)  # noqa: B010 - a type checker keeps the dataclass's own signature
    return cls


@_with_arguments_of_transformers
@dataclasses.dataclass(frozen=True)
class MetaFormerConfig:
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
        problem_type: what the loss and the probabilities are for, one of `PROBLEM_TYPES`; None for a single label per
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
        convert_fields(self, _KINDS)
        check_rules(self, _rules(self))

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
        _refuse_other_models(data)
        arguments = {name: value for name, value in data.items() if name in _ARGUMENTS or "model_type" not in data}
        if not (labels := arguments.get("id2label")):
            arguments.pop("id2label", None)
            if "transformers_version" in data:
                arguments.setdefault("num_labels", 2)
        elif isinstance(labels, Mapping):
            arguments["id2label"] = {index: str(label) for index, label in labels.items()}
        return cls(**arguments).with_changes(**changes)

    def with_changes(self: _Config, **changes: Any) -> _Config:
        """A copy with other fields, as `from_pretrained(name, **changes)` of `transformers` changes a config.

        Other names set the number of labels, and another number of labels removes the names.
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

    def to_json_file(self, file: str | os.PathLike[str]) -> None:
        """Writes `config.json` under any name."""
        write_json(Path(file).expanduser(), self.to_dict())

    def save_pretrained(self, folder: str | os.PathLike[str], push_to_hub: bool = False, **hub_options: Any) -> None:
        """Writes `config.json` into a folder, which is made if it does not exist.

        Args:
            folder: the folder.
            push_to_hub: also upload it, to `repo_id` of `hub_options` or a repository with the folder's name.
            hub_options: as in `push_to_hub`.
        """
        self.to_json_file(Path(folder) / CONFIG)
        if push_to_hub:
            self.push_to_hub(hub_options.pop("repo_id", Path(folder).name), **hub_options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads `config.json` to the Hugging Face Hub. The options and the result are those of `hub.push_to_hub`."""
        return push_to_hub(repo_id, self.save_pretrained, **options)


# The config checks its fields itself, with better messages than the annotations' checker of the tests.
no_type_check(MetaFormerConfig.__init__)

# MetaFormer is the class of networks of both papers. The PoolFormer names are the API of transformers, which has the
# first paper's networks only; code that was written for it stays valid for the whole class.
PoolFormerConfig = MetaFormerConfig

_ARGUMENTS = WITHOUT_EFFECT | {field.name for field in dataclasses.fields(MetaFormerConfig)}
_ARGUMENTS |= {"label2id", "num_encoder_blocks"}
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


def _fields_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The fields for arguments of the constructor, some of which only transformers has."""
    if unknown := sorted(map(printable, arguments.keys() - _ARGUMENTS)):
        known = [field.name for field in dataclasses.fields(MetaFormerConfig)]
        near = [close for name in unknown[:5] for close in difflib.get_close_matches(name, known, n=1)]
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise InputError(f"MetaFormerConfig has no field {first_few(unknown)}.{hint} Its fields: {', '.join(known)}.")
    fields = {name: value for name, value in arguments.items() if name not in WITHOUT_EFFECT}
    stages, label2id = fields.pop("num_encoder_blocks", None), fields.pop("label2id", None)
    depths = fields.get("depths", MetaFormerConfig.depths)
    if INTEGER.accepts(stages):
        if isinstance(depths, Sequence) and len(depths) != stages:
            raise InputError(f"num_encoder_blocks={stages}: expected one for each of depths={short_repr(depths)}.")
        # With fewer stages, transformers still writes its four default values.
        for name in ("patch_sizes", "strides", "padding"):
            if isinstance(entries := fields.get(name, getattr(MetaFormerConfig, name)), Sequence):
                fields[name] = entries[:stages]
    if isinstance(depths, Sequence):  # transformers does not have these two; their defaults follow the stages
        defaults = {"token_mixers": ("pooling",) * len(depths), "position_embeddings": (False,) * len(depths)}
        fields = {**defaults, **fields}
    if fields.get("id2label") is None and isinstance(label2id, Mapping) and label2id:
        if not all(isinstance(index, str | numbers.Integral) for index in label2id.values()):
            raise InputError(f"label2id={short_repr(label2id)}: expected the index of each name.")
        fields["id2label"] = {_index(index): label for label, index in label2id.items()}
    if isinstance(names := fields.get("id2label"), Mapping | Sequence):
        fields.setdefault("num_labels", len(names))
    return fields


def names_by_index(names: Mapping[Any, Any] | Sequence[Any]) -> dict[Any, Any]:
    """Class names by index, from a list of them, or from a mapping, whose keys are texts if it comes from JSON."""
    return {_index(index): name for index, name in (names.items() if isinstance(names, Mapping) else enumerate(names))}


def _index(key: Any) -> Any:
    return int(key) if isinstance(key, str) and key.isdecimal() and len(key) < _LONGEST_INDEX else key


_LONGEST_INDEX = 10  # characters; int() refuses numbers of thousands of digits


def _are_names(value: Any) -> bool:
    if not isinstance(value, Mapping | Sequence) or isinstance(value, str):
        return False
    names = names_by_index(value)
    return all(map(INTEGER.accepts, names)) and all(map(STRING.accepts, names.values()))


_NAMES = FieldType(
    "a mapping from indices to names, or a list of names",
    _are_names,
    lambda value: FrozenMapping({int(index): name for index, name in names_by_index(value).items()}),
)
_PER_STAGE: Mapping[str, FieldType] = {
    **dict.fromkeys(
        ("depths", "hidden_sizes", "patch_sizes", "strides", "padding"),
        sequence_of(INTEGER, "whole numbers, one for each stage"),
    ),
    "token_mixers": sequence_of(STRING, "names, one for each stage"),
    "position_embeddings": sequence_of(BOOLEAN, "True or False, one for each stage"),
}
_RESIDUAL_SCALES = sequence_of(optional(NUMBER), "numbers or None, one for each stage")
_KINDS: Mapping[str, FieldType] = {
    **_PER_STAGE,
    **dict.fromkeys(("num_channels", "pool_size", "num_labels"), INTEGER),
    **dict.fromkeys(("mlp_ratio", "drop_path_rate", "layer_scale_init_value", "dropout_rate"), NUMBER),
    **dict.fromkeys(("norm_epsilon", "head_norm_epsilon", "head_dropout_rate"), NUMBER),
    **dict.fromkeys(("hidden_act", "norm", "head_order", "head", "convolution_init"), STRING),
    **dict.fromkeys(("use_layer_scale", "output_hidden_states", "return_dict"), BOOLEAN),
    **dict.fromkeys(("norm_bias", "downsample_norm", "mlp_bias", "attention_bias"), BOOLEAN),
    "residual_scale_init_values": optional(_RESIDUAL_SCALES),
    "problem_type": optional(STRING),
    "id2label": optional(_NAMES),
    "image_size": optional(INTEGER),
}


def _refuse_other_models(data: Mapping[str, Any]) -> None:
    if "architecture" in data:
        raise InputError(
            f"This config.json is timm's, for {short_repr(data['architecture'])}, and does not describe the layers. "
            "Expected model_type 'poolformer' or 'metaformer'; load_pretrained reads timm's config together with its "
            "weights."
        )
    if (model_type := data.get("model_type", "poolformer")) not in ("poolformer", "metaformer"):
        raise InputError(
            f"This config.json describes a {short_repr(model_type)} model. Expected model_type 'poolformer' or "
            "'metaformer'."
        )
    classes = data.get("architectures") or ()
    known = ("PoolFormer", "MetaFormer")
    if not isinstance(classes, Sequence) or not all(isinstance(c, str) and c.startswith(known) for c in classes):
        raise InputError(
            f"This config.json has architectures={short_repr(classes)}. Expected those of PoolFormer or MetaFormer, "
            "such as ['PoolFormerForImageClassification']."
        )


def _rules(config: MetaFormerConfig) -> list[tuple[str, bool, str]]:
    """(field, whether it is in range, what is expected)."""
    stages, named = len(config.depths), config.id2label
    fixed_size = {"spatial_fc", "random"} & set(config.token_mixers) or any(config.position_embeddings)
    residual_scales = config.residual_scale_init_values
    return [
        (
            "depths",
            stages >= 1 and all(d >= 1 for d in config.depths) and sum(config.depths) <= _MOST_BLOCKS,
            f"at least one stage, each of at least one block, and at most {_MOST_BLOCKS:,} blocks",
        ),
        ("num_channels", 1 <= config.num_channels <= _MOST_CHANNELS, f"1 to {_MOST_CHANNELS:,}"),
        (
            "mlp_ratio",
            config.mlp_ratio > 0
            and all(1 <= c * config.mlp_ratio <= 16 * _MOST_CHANNELS for c in config.hidden_sizes if c >= 1),
            f"a positive number that gives every stage 1 to {16 * _MOST_CHANNELS:,} hidden channels",
        ),
        ("pool_size", 1 <= config.pool_size < 256 and config.pool_size % 2 == 1, "a positive odd number below 256"),
        (
            "hidden_sizes",
            all(1 <= c <= _MOST_CHANNELS for c in config.hidden_sizes),
            f"channel counts of 1 to {_MOST_CHANNELS:,}",
        ),
        (
            "patch_sizes",
            all(1 <= p <= _LARGEST_KERNEL for p in config.patch_sizes),
            f"kernel sizes of 1 to {_LARGEST_KERNEL:,}",
        ),
        ("strides", all(1 <= s <= _LARGEST_KERNEL for s in config.strides), f"strides of 1 to {_LARGEST_KERNEL:,}"),
        (
            "padding",
            all(0 <= p <= k for p, k in zip(config.padding, config.patch_sizes)),
            "padding of 0 or more, and at most the kernel size in patch_sizes",
        ),
        ("drop_path_rate", 0 <= config.drop_path_rate < 1, "a probability in [0, 1)"),
        ("dropout_rate", 0 <= config.dropout_rate < 1, "a probability in [0, 1)"),
        ("head_dropout_rate", 0 <= config.head_dropout_rate < 1, "a probability in [0, 1)"),
        ("norm_epsilon", config.norm_epsilon > 0, "a positive number"),
        ("head_norm_epsilon", config.head_norm_epsilon > 0, "a positive number"),
        ("num_labels", 0 <= config.num_labels <= _MOST_LABELS, f"0 (no head) to {_MOST_LABELS:,}"),
        ("head", config.head in HEADS, f"one of {', '.join(HEADS)}"),
        ("convolution_init", config.convolution_init in CONVOLUTION_INITS, f"one of {', '.join(CONVOLUTION_INITS)}"),
        (
            "residual_scale_init_values",
            residual_scales is None or len(residual_scales) == stages,
            f"None, or one entry for each of the {stages} stages in depths",
        ),
        ("hidden_act", _is_activation(config.hidden_act), f"one of {', '.join(HIDDEN_ACTS)}"),
        (
            "token_mixers",
            set(config.token_mixers) <= MIXER_PARAMETERS.keys(),
            f"names among {', '.join(MIXER_PARAMETERS)}",
        ),
        ("norm", config.norm in NORMS, f"one of {', '.join(NORMS)}"),
        ("head_order", config.head_order in HEAD_ORDERS, f"one of {', '.join(HEAD_ORDERS)}"),
        (
            "image_size",
            config.image_size is None or config.smallest_side <= config.image_size <= _LARGEST_IMAGE,
            f"None, or {short_repr(config.smallest_side)} (the smallest side that the network accepts) to "
            f"{_LARGEST_IMAGE:,} pixels",
        ),
        (
            "image_size",
            _most_paired_positions(config) <= _MOST_POSITIONS,
            f"at most {_MOST_POSITIONS:,} positions in the stages with spatial_fc or random, which have a parameter "
            "for every pair of positions",
        ),
        (
            "image_size",
            config.image_size is not None or not fixed_size,
            "the input side in pixels, because position embeddings and the mixers spatial_fc and random have a "
            "parameter for every position. The published networks use image_size=224",
        ),
        (
            "num_labels",
            named is None or (len(named) == config.num_labels and sorted(named) == list(range(len(named)))),
            f"id2label to have a name for every index from 0 to num_labels - 1, but it has {len(named or ())}. Give "
            "both, or id2label=None",
        ),
        (
            "problem_type",
            config.problem_type in (None, *PROBLEM_TYPES),
            f"None, or one of {', '.join(PROBLEM_TYPES)}",
        ),
        (
            "problem_type",
            config.problem_type != "single_label_classification" or config.num_labels != 1,
            "num_labels of at least 2, because the only label would always have a probability of 1; or 'regression'",
        ),
        *(
            (name, len(getattr(config, name)) == stages, f"one entry for each of the {stages} stages in depths")
            for name in _PER_STAGE
            if name != "depths"
        ),
    ]


def _most_paired_positions(config: MetaFormerConfig) -> int:
    """The most positions in a stage whose mixer has a parameter for every pair of them."""
    if not config.image_size or not all(s >= 1 for s in config.strides):
        return 0
    sizes = zip(config.token_mixers, config.feature_sizes(config.image_size))
    return max((side * side for mixer, side in sizes if mixer in ("spatial_fc", "random")), default=0)


def _is_activation(name: str) -> bool:
    if name in HIDDEN_ACTS:
        return True
    # One that was added to the table. Imported here because this module needs no jax otherwise.
    from poolformer_jax.network.functional import ACTIVATIONS

    return name in ACTIVATIONS


# Fields that do not make a network another one: labels, rates, initial values, what callers get back, and what weights
# in another layout may choose (`use_layer_scale`, `head_order`, `head_norm_epsilon`, `image_size`).
_NOT_ARCHITECTURE = {
    *("num_labels", "id2label", "problem_type", "output_hidden_states", "return_dict"),
    *("drop_path_rate", "dropout_rate", "head_dropout_rate", "layer_scale_init_value", "convolution_init"),
    *("use_layer_scale", "head_order", "head_norm_epsilon", "image_size"),
}
_ARCHITECTURE = tuple(
    field.name for field in dataclasses.fields(MetaFormerConfig) if field.name not in _NOT_ARCHITECTURE
)


def published_variant(config: MetaFormerConfig) -> str | None:
    """The name of the published network with this architecture, whatever its head; None if it is not published."""
    return _published_architectures().get(_architecture(config))


def describe_network(config: MetaFormerConfig) -> str:
    """The published name or the sizes of a network, and its number of labels: "s12, 1000 labels"."""
    sizes = published_variant(config) or f"depths {config.depths}, hidden sizes {config.hidden_sizes}"
    return f"{sizes}, {config.num_labels} labels" if config.num_labels else sizes


@functools.cache
def _published_architectures() -> dict[tuple[Any, ...], str]:
    return {_architecture(MetaFormerConfig.from_variant(name)): name for name in VARIANTS}


def _architecture(config: MetaFormerConfig) -> tuple[Any, ...]:
    return tuple(getattr(config, name) for name in _ARCHITECTURE)

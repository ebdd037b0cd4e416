"""What a PoolFormer is: one frozen value.

Field names are those of `transformers` where it has one, so that a `config.json` from the Hub is read as it is.
Sources: arXiv 2111.11418; sail-sg/poolformer, models/poolformer.py and models/metaformer.py; transformers,
configuration_poolformer.py.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, no_type_check

from poolformer_jax.errors import InputError
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
    short_repr,
)
from poolformer_jax.network.parameter_table import MIXER_PARAMETERS
from poolformer_jax.network.variants import VARIANTS

# The keys of `functional.ACTIVATIONS`, `functional.NORMS`, and the orders that `heads.classify` knows.
HIDDEN_ACTS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")
NORMS = ("group_norm", "layer_norm")
HEAD_ORDERS = ("norm_pool", "pool_norm")

_Config = TypeVar("_Config", bound="PoolFormerConfig")


@dataclasses.dataclass(frozen=True)
class PoolFormerConfig:
    """A PoolFormer's architecture; hashable, and checked when it is made.

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
        hidden_act: activation of the MLP, a key of `functional.ACTIVATIONS`; "gelu" is the exact erf form.
        use_layer_scale: whether every residual branch has a learnt scale per channel.
        layer_scale_init_value: its initial value.
        num_labels: classes of the head; 0 means no head, and the pooled features in the place of the logits.
        id2label: class names by index, for every index below `num_labels`; None if unknown.
        dropout_rate: dropout after both layers of the MLP.
        token_mixers: one name per stage, of `parameter_table.MIXER_PARAMETERS`.
        norm: "group_norm" (one group over height, width and channels) or "layer_norm" (over channels at each position,
            as in the ablations with attention).
        head_order: "norm_pool" (sail and transformers: normalise the map, then average) or "pool_norm" (timm: average,
            then LayerNorm with epsilon 1e-6).
        position_embeddings: per stage, whether a learnt position embedding is added to the stage's input.
        image_size: height and width in pixels that position embeddings and "spatial_fc" are made for; None if the
            network accepts any size.

    Raises:
        ValueError: naming every field of a wrong type or out of range, with the value given and what was expected.
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

    def __post_init__(self) -> None:
        convert_fields(self, _KINDS)
        check_rules(self, _rules(self))

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
        """The published network `name` ("s12", ..., or an ablation), with `changes` to its fields.

        Raises:
            ValueError: if there is no such variant, or a name in `changes` is not a field.
        """
        key = name.removeprefix("poolformer_")
        if key not in VARIANTS:
            raise InputError(f"There is no variant {name!r}. Expected one of: {', '.join(VARIANTS)}.")
        _refuse_unknown_fields(changes)
        return cls(**{**VARIANTS[key], **changes})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PoolFormerConfig":
        """Reads what `to_dict` wrote, or the `config.json` of a PoolFormer from `transformers`.

        If `model_type` is given, fields that only `transformers` has (its version, its data type, ...) are ignored. As
        in `transformers`, the number of labels follows from `id2label` if `num_labels` is missing.

        Raises:
            ValueError: if `data` describes another architecture, if the problem is not single-label classification, or
                if a field is out of range.
        """
        _refuse_other_models(data)
        known = {field.name for field in dataclasses.fields(cls)}
        fields = {name: value for name, value in data.items() if name in known}
        if isinstance(stages := data.get("num_encoder_blocks"), int):
            # With fewer stages, transformers still writes its four default values.
            for name in ("patch_sizes", "strides", "padding"):
                if isinstance(entries := fields.get(name, getattr(cls, name)), Sequence):
                    fields[name] = entries[:stages]
        if labels := fields.pop("id2label", None):
            fields["id2label"] = labels
            if isinstance(labels, Mapping):  # JSON's keys are texts
                fields["id2label"] = {_index(key): str(label) for key, label in labels.items()}
                fields.setdefault("num_labels", len(labels))
        elif "transformers_version" in data:
            # transformers leaves its default out: two labels.
            fields.setdefault("num_labels", 2)
        # transformers does not have these two fields; their defaults follow the number of stages.
        depths = fields.get("depths", cls.depths)
        stages = len(depths) if isinstance(depths, Sequence) else len(cls.depths)
        fields = {"token_mixers": ("pooling",) * stages, "position_embeddings": (False,) * stages, **fields}
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """All fields as values for JSON, with the entries that `transformers` needs to read them."""
        data: dict[str, Any] = {"model_type": "poolformer", "architectures": ["PoolFormerForImageClassification"]}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            data[field.name] = list(value) if isinstance(value, tuple) else value
        data["num_encoder_blocks"] = len(self.depths)
        if self.id2label is None:
            del data["id2label"]
        else:
            data["id2label"] = {str(index): label for index, label in sorted(self.id2label.items())}
            data["label2id"] = {label: index for index, label in sorted(self.id2label.items())}
        return data


# The config checks its fields itself, with better messages than the annotations' checker of the tests.
no_type_check(PoolFormerConfig.__init__)


def _index(key: Any) -> Any:
    return int(key) if isinstance(key, str) and key.isdecimal() and len(key) < _LONGEST_INDEX else key


_LONGEST_INDEX = 10  # characters; int() refuses numbers of thousands of digits


_NAMES = FieldType(
    "a mapping from indices to names",
    lambda value: (
        isinstance(value, Mapping) and all(map(INTEGER.accepts, value)) and all(map(STRING.accepts, value.values()))
    ),
    lambda value: FrozenMapping({int(index): name for index, name in value.items()}),
)
_PER_STAGE: Mapping[str, FieldType] = {
    **dict.fromkeys(
        ("depths", "hidden_sizes", "patch_sizes", "strides", "padding"),
        sequence_of(INTEGER, "whole numbers, one for each stage"),
    ),
    "token_mixers": sequence_of(STRING, "names, one for each stage"),
    "position_embeddings": sequence_of(BOOLEAN, "True or False, one for each stage"),
}
_KINDS: Mapping[str, FieldType] = {
    **_PER_STAGE,
    **dict.fromkeys(("num_channels", "pool_size", "num_labels"), INTEGER),
    **dict.fromkeys(("mlp_ratio", "drop_path_rate", "layer_scale_init_value", "dropout_rate"), NUMBER),
    **dict.fromkeys(("hidden_act", "norm", "head_order"), STRING),
    "use_layer_scale": BOOLEAN,
    "id2label": optional(_NAMES),
    "image_size": optional(INTEGER),
}


def _refuse_other_models(data: Mapping[str, Any]) -> None:
    if "architecture" in data:
        raise InputError(
            f"This config.json is timm's, for {short_repr(data['architecture'])}, and does not describe the layers. "
            "Expected model_type 'poolformer'; load_pretrained reads timm's config together with its weights."
        )
    if (model_type := data.get("model_type", "poolformer")) != "poolformer":
        raise InputError(f"This config.json describes a {model_type!r} model. Expected model_type 'poolformer'.")
    if (problem := data.get("problem_type")) not in (None, "single_label_classification"):
        raise InputError(
            f"This config.json says problem_type={problem!r}. Expected 'single_label_classification', which the loss "
            "and the probabilities are for. If you only need logits, remove the entry."
        )
    classes = data.get("architectures") or ()
    if not all(str(name).startswith("PoolFormer") for name in classes):
        raise InputError(
            f"This config.json has architectures={short_repr(classes)}. Expected those of PoolFormer, such as "
            "['PoolFormerForImageClassification']."
        )
    if "model_type" not in data:  # then nothing shows that unknown names are fields of transformers
        _refuse_unknown_fields({name: data[name] for name in data.keys() - _DERIVED})


_DERIVED = {"architectures", "label2id", "num_encoder_blocks"}  # what `to_dict` writes besides the fields


def _refuse_unknown_fields(changes: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(PoolFormerConfig)]
    if unknown := sorted(set(changes) - set(known)):
        raise InputError(f"PoolFormerConfig has no field {', '.join(unknown)}. Its fields: {', '.join(known)}.")


def _rules(config: PoolFormerConfig) -> list[tuple[str, bool, str]]:
    """(field, whether it is in range, what is expected)."""
    stages, named = len(config.depths), config.id2label
    fixed_size = "spatial_fc" in config.token_mixers or any(config.position_embeddings)
    return [
        (
            "depths",
            stages >= 1 and all(d >= 1 for d in config.depths),
            "at least one stage, each of at least one block",
        ),
        ("num_channels", config.num_channels >= 1, "at least 1"),
        (
            "mlp_ratio",
            config.mlp_ratio > 0 and all(1 <= c * config.mlp_ratio < math.inf for c in config.hidden_sizes if c >= 1),
            "a positive number that gives every stage at least one hidden channel, and finitely many",
        ),
        ("pool_size", config.pool_size >= 1 and config.pool_size % 2 == 1, "a positive odd number"),
        ("hidden_sizes", all(c >= 1 for c in config.hidden_sizes), "positive channel counts"),
        ("patch_sizes", all(p >= 1 for p in config.patch_sizes), "positive kernel sizes"),
        ("strides", all(s >= 1 for s in config.strides), "positive strides"),
        ("padding", all(p >= 0 for p in config.padding), "padding of 0 or more"),
        ("drop_path_rate", 0 <= config.drop_path_rate < 1, "a probability in [0, 1)"),
        ("dropout_rate", 0 <= config.dropout_rate < 1, "a probability in [0, 1)"),
        ("num_labels", config.num_labels >= 0, "0 (no head) or more"),
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
            config.image_size is None or config.image_size >= config.smallest_side,
            f"None, or at least {config.smallest_side} pixels, the smallest side that the network accepts",
        ),
        (
            "image_size",
            config.image_size is not None or not fixed_size,
            "the input side in pixels, because position embeddings and the spatial_fc mixer have a parameter for every "
            "position. The published ablations use image_size=224",
        ),
        (
            "num_labels",
            named is None or sorted(named) == list(range(config.num_labels)),
            f"id2label to have a name for every index from 0 to num_labels - 1, but it has {len(named or ())}. Give "
            "both, or id2label=None",
        ),
        *(
            (name, len(getattr(config, name)) == stages, f"one entry for each of the {stages} stages in depths")
            for name in _PER_STAGE
            if name != "depths"
        ),
    ]


def _is_activation(name: str) -> bool:
    if name in HIDDEN_ACTS:
        return True
    # One that was added to the table. Imported here because this module needs no jax otherwise.
    from poolformer_jax.network.functional import ACTIVATIONS

    return name in ACTIVATIONS


# What makes a network the published one: all fields but the labels, the rates and the initial values, and what weights
# in another layout may choose (`use_layer_scale`, `head_order`, `image_size`).
_ARCHITECTURE = (
    "depths",
    "hidden_sizes",
    "mlp_ratio",
    "hidden_act",
    "pool_size",
    "token_mixers",
    "position_embeddings",
    "num_channels",
    "patch_sizes",
    "strides",
    "padding",
    "norm",
)


def published_variant(config: PoolFormerConfig) -> str | None:
    """The name of the published network with this architecture, whatever its head; None if it is not published."""
    for name in VARIANTS:
        published = PoolFormerConfig.from_variant(name)
        if all(getattr(config, field) == getattr(published, field) for field in _ARCHITECTURE):
            return name
    return None

"""The types and the ranges of `MetaFormerConfig`'s fields."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from poolformer_jax.fields import (
    BELOW_1,
    BOOLEAN,
    INTEGER,
    NUMBER,
    POSITIVE,
    STRING,
    FieldType,
    FrozenMapping,
    Range,
    between,
    in_range,
    one_of,
    optional,
    or_none,
    sequence_of,
)
from poolformer_jax.messages import short_repr
from poolformer_jax.network.parameter_table import HEAD_DIM, MIXER_PARAMETERS

# The keys of `functional.ACTIVATIONS`, `functional.NORMS`, and the orders that `heads.classify` knows.
# The activations are those of transformers without parameters (all but prelu and xielu), and StarReLU.
HIDDEN_ACTS = (
    *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh"),
    *("gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2"),
    *("relu6", "sigmoid", "silu", "sqrtsoftplus", "star_relu", "swish", "tanh"),
)
NORMS = ("group_norm", "layer_norm")
HEAD_ORDERS = ("norm_pool", "pool_norm")
HEADS = ("linear", "mlp")
CONVOLUTION_INITS = ("torch", "normal")
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]

# A config.json is a small file: what it asks for is bounded before any work is done.
_MOST_LABELS, _MOST_BLOCKS, _MOST_CHANNELS, _LARGEST_KERNEL, _LARGEST_IMAGE = 1_000_000, 10_000, 65_536, 1_024, 16_384
_MOST_POSITIONS = 16_384  # of a mixer that has a parameter for every pair of positions
_LONGEST_INDEX = 10  # characters; int() refuses numbers of thousands of digits


def names_by_index(names: Mapping[Any, Any] | Sequence[Any]) -> dict[Any, Any]:
    """Class names by index, from a list of them, or from a mapping, whose keys are texts if it comes from JSON."""
    pairs = names.items() if isinstance(names, Mapping) else enumerate(names)
    return {as_index(index): name for index, name in pairs}


def as_index(key: Any) -> Any:
    """The number in a text of digits; anything else unchanged."""
    return int(key) if isinstance(key, str) and key.isdecimal() and len(key) < _LONGEST_INDEX else key


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
_NUMBERS_PER_STAGE = ("hidden_sizes", "patch_sizes", "strides", "padding")
_PER_STAGE = (*_NUMBERS_PER_STAGE, "token_mixers", "position_embeddings")
FIELD_TYPES: Mapping[str, FieldType] = {
    **dict.fromkeys(("depths", *_NUMBERS_PER_STAGE), sequence_of(INTEGER, "whole numbers, one for each stage")),
    "token_mixers": sequence_of(STRING, "names, one for each stage"),
    "position_embeddings": sequence_of(BOOLEAN, "True or False, one for each stage"),
    **dict.fromkeys(("num_channels", "pool_size", "num_labels"), INTEGER),
    **dict.fromkeys(("mlp_ratio", "drop_path_rate", "layer_scale_init_value", "dropout_rate"), NUMBER),
    **dict.fromkeys(("norm_epsilon", "head_norm_epsilon", "head_dropout_rate"), NUMBER),
    **dict.fromkeys(("hidden_act", "norm", "head_order", "head", "convolution_init"), STRING),
    **dict.fromkeys(("use_layer_scale", "output_hidden_states", "return_dict"), BOOLEAN),
    **dict.fromkeys(("norm_bias", "downsample_norm", "mlp_bias", "attention_bias"), BOOLEAN),
    "residual_scale_init_values": optional(sequence_of(optional(NUMBER), "numbers or None, one for each stage")),
    "problem_type": optional(STRING),
    "id2label": optional(_NAMES),
    "image_size": optional(INTEGER),
}


def rules(config: Any) -> list[tuple[str, object, str]]:
    """The rules for `check_rules` of a MetaFormerConfig whose fields have the right types."""
    named, hidden = config.id2label, [c * config.mlp_ratio for c in config.hidden_sizes if c >= 1]
    return [
        *_stage_rules(config),
        *in_range(config, BELOW_1, "drop_path_rate", "dropout_rate", "head_dropout_rate"),
        *in_range(config, POSITIVE, "norm_epsilon", "head_norm_epsilon"),
        *in_range(config, between(1, _MOST_CHANNELS), "num_channels"),
        *in_range(config, between(0, _MOST_LABELS), "num_labels"),
        *in_range(config, one_of(NORMS), "norm"),
        *in_range(config, one_of(HEADS), "head"),
        *in_range(config, one_of(HEAD_ORDERS), "head_order"),
        *in_range(config, one_of(CONVOLUTION_INITS), "convolution_init"),
        *in_range(config, or_none(one_of(get_args(ProblemType))), "problem_type"),
        ("hidden_act", _is_activation(config.hidden_act), one_of(HIDDEN_ACTS).description),
        ("pool_size", 1 <= config.pool_size < 256 and config.pool_size % 2 == 1, "a positive odd number below 256"),
        (
            "mlp_ratio",
            config.mlp_ratio > 0 and all(1 <= channels <= 16 * _MOST_CHANNELS for channels in hidden),
            f"a positive number that gives every stage 1 to {16 * _MOST_CHANNELS:,} hidden channels",
        ),
        (
            "num_labels",
            named is None or (len(named) == config.num_labels and sorted(named) == list(range(len(named)))),
            f"id2label to have a name for every index from 0 to num_labels - 1, but it has {len(named or ())}. Give "
            "both, or id2label=None",
        ),
        (
            "problem_type",
            config.problem_type != "single_label_classification" or config.num_labels != 1,
            "num_labels of at least 2, because the only label would always have a probability of 1; or 'regression'",
        ),
        *_image_size_rules(config),
    ]


def _stage_rules(config: Any) -> list[tuple[str, object, str]]:
    stages, scales = len(config.depths), config.residual_scale_init_values
    one_each = f"one entry for each of the {stages} stages in depths"
    return [
        (
            "depths",
            stages >= 1 and min(config.depths) >= 1 and sum(config.depths) <= _MOST_BLOCKS,
            f"at least one stage, each of at least one block, and at most {_MOST_BLOCKS:,} blocks",
        ),
        *in_range(config, _each(between(1, _MOST_CHANNELS)), "hidden_sizes"),
        (
            "hidden_sizes",
            all(c % HEAD_DIM == 0 for c, m in zip(config.hidden_sizes, config.token_mixers) if m == "attention"),
            f"a multiple of {HEAD_DIM}, the channels of a head, in every stage with attention",
        ),
        *in_range(config, _each(between(1, _LARGEST_KERNEL)), "patch_sizes", "strides"),
        (
            "padding",
            all(0 <= p <= k for p, k in zip(config.padding, config.patch_sizes)),
            "padding of 0 or more, and at most the kernel size in patch_sizes",
        ),
        (
            "token_mixers",
            set(config.token_mixers) <= MIXER_PARAMETERS.keys(),
            f"names among {', '.join(MIXER_PARAMETERS)}",
        ),
        *((name, len(getattr(config, name)) == stages, one_each) for name in _PER_STAGE),
        ("residual_scale_init_values", scales is None or len(scales) == stages, f"None, or {one_each}"),
    ]


def _each(allowed: Range) -> Range:
    return Range(f"{allowed.description} for each stage", lambda values: all(map(allowed.contains, values)))


def _image_size_rules(config: Any) -> list[tuple[str, object, str]]:
    size, smallest = config.image_size, config.smallest_side
    fixed_size = {"spatial_fc", "random"} & set(config.token_mixers) or any(config.position_embeddings)
    return [
        (
            "image_size",
            size is None or smallest <= size <= _LARGEST_IMAGE,
            f"None, or {short_repr(smallest)} (the smallest side that the network takes) to {_LARGEST_IMAGE:,} pixels",
        ),
        (
            "image_size",
            _most_paired_positions(config) <= _MOST_POSITIONS,
            f"at most {_MOST_POSITIONS:,} positions in the stages with spatial_fc or random, which have a parameter "
            "for every pair of positions",
        ),
        (
            "image_size",
            size is not None or not fixed_size,
            "the input side in pixels, because position embeddings and the mixers spatial_fc and random have a "
            "parameter for every position. The published networks use image_size=224",
        ),
    ]


def _most_paired_positions(config: Any) -> int:
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

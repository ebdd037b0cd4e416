"""Turns a state dict into a parameter tree and back, by the tables of `names.py`; every array is used exactly once.

All names and shapes that do not fit are reported in one error, with the nearest name that exists.
"""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import DTypeLike

from poolformer_jax.errors import InputError
from poolformer_jax.messages import first_few, printable, printable_message, short_repr
from poolformer_jax.network import (
    PoolFormerConfig,
    WeightsMismatch,
    check_names_and_shapes,
    leaves_by_path,
    published_variant,
    variables_of,
)
from poolformer_jax.weights.containers.ignore import names_to_read
from poolformer_jax.weights.detection import infer_config
from poolformer_jax.weights.matching import MatchedNames, match_names
from poolformer_jax.weights.names import LAYOUTS, TRANSFORMS, Leaf, leaves
from poolformer_jax.weights.published import is_pooling_open


@runtime_checkable
class ArrayLike(Protocol):
    """An array, or anything with a shape and a type that `numpy.asarray` turns into one.

    A tensor that is still in its file (`containers.StoredTensor`) is one: it is read when `numpy.asarray` is called.
    """

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> Any: ...


@dataclass(frozen=True)
class ImportPlan:
    """Which array of a state dict becomes which leaf of the parameter tree. Names and shapes have been checked."""

    layout: str  # a key of `names.LAYOUTS`
    config: PoolFormerConfig  # the network
    leaves: tuple[Leaf, ...]  # every parameter of the network, in the order of the layout
    names: Mapping[str, str]  # the state dict's own name for each name of the layout; they differ by a prefix at most
    has_classifier: bool  # False if the weights are a backbone, without final norm and head

    @property
    def variant(self) -> str | None:
        """The published name of the network, or None."""
        return published_variant(self.config)

    def given_name(self, leaf: Leaf) -> str:
        """The state dict's own name for `leaf`, with its prefix."""
        return self.names[leaf.name]

    def read(self, state_dict: Mapping[str, ArrayLike], param_dtype: DTypeLike | None = np.float32) -> dict[str, Any]:
        """The network's variables as NumPy arrays: contiguous copies, in the layout of the parameter tree.

        Args:
            state_dict: the arrays that were planned.
            param_dtype: type of the parameters; None keeps the type of every array.
        """
        arrays = {leaf.path: _read_leaf(leaf, state_dict[self.given_name(leaf)], param_dtype) for leaf in self.leaves}
        return variables_of(self.config, arrays)


def match_state_dict(state_dict: Mapping[str, ArrayLike]) -> MatchedNames:
    """Finds the layout of a state dict, without reading its values.

    Raises InputError if no known layout has these names, or the arrays are not floating-point numbers.
    """
    matched = match_names({name: tuple(array.shape) for name, array in state_dict.items()})
    # Integers are the weights of a quantized network. Only known names: others are reported as unexpected.
    # "float32" is NumPy's name of the type, and "torch.float32" PyTorch's.
    types = {
        match.given: str(getattr(dtype := state_dict[match.given].dtype, "name", dtype)).removeprefix("torch.")
        for match in matched.matches
    }
    if wrong := [f"{printable(name)} ({dtype})" for name, dtype in types.items() if "float" not in dtype]:
        raise InputError(
            f"These weights are not floating-point numbers: {first_few(wrong, 3)}. Expected float16, bfloat16, float32 "
            "or float64."
        )
    return matched


def plan_import(
    matched: MatchedNames, config: PoolFormerConfig | None = None, config_source: str = "the config given"
) -> ImportPlan:
    """Matches names and shapes with those of a network.

    `config` is None to infer the network; `config_source` says in messages where it comes from. Raises WeightsMismatch
    if a name is missing or left over, or a shape differs; InputError if the network cannot be inferred.
    """
    if config is None:
        config, config_source = infer_config(matched), "their names and shapes"
    if (blocks := sum(config.depths)) > len(matched.shapes):
        # A config may come from a hostile file: checked before its parameters are listed.
        raise InputError(
            f"These weights have {len(matched.shapes)} arrays, and depths={short_repr(config.depths)} in "
            f"{config_source} makes {short_repr(blocks)} blocks. Expected the config of these weights."
        )
    expected = leaves(config, matched.layout, classifier=matched.has_classifier)
    plan = ImportPlan(matched.layout, config, expected, matched.names, matched.has_classifier)
    try:
        check_names_and_shapes(
            f"These weights, in the layout {plan.layout!r}, do not match {plan.variant or 'the network'} according to "
            f"{config_source}:",
            {name: matched.shapes[given] for name, given in matched.names.items()},
            {leaf.name: leaf.stored_shape for leaf in expected},
        )
    except WeightsMismatch as error:
        if error.unexpected and not error.missing:
            error.args = (printable_message(f"{error}\n{_how_to_leave_out(matched, list(error.unexpected))}"),)
        raise
    return plan


def _how_to_leave_out(matched: MatchedNames, unexpected: Sequence[str]) -> str:
    """What to do about names that the network has no place for, such as those of a head of another kind."""
    some = [matched.names[name] for name in unexpected[:_MOST_NAMES]]
    kept = {match.given for match in matched.matches} - set(some)
    patterns = list(dict.fromkeys(_pattern_of(name, kept) for name in some))[:3]
    options = " ".join(f"--ignore {pattern!r}" for pattern in patterns)
    how = f"To leave names out, pass ignore={patterns} ({options})."
    if any(match.row.path.startswith("head/") for match in matched.matches):
        return how
    kind = next((kind for part, kind in _OTHER_HEADS.items() if any(part in name for name in some)), "of another kind")
    return (
        f"No name is that of a linear or MLP head; the names above may be of a head {kind}, which this package does "
        f"not have. {how} For a new head also pass num_labels=N and reset_head=True."
    )


# Parts of names by which heads that replace the published ones are known, and what these are called.
_OTHER_HEADS = {
    "decoder.embed_fc": "with ML-Decoder",
    "decoder.duplicate_pooling": "with ML-Decoder",
    "attnpool": "with attention pooling",
    "attention_pool": "with attention pooling",
    "attn_pool": "with attention pooling",
}
_MOST_NAMES, _MOST_PARTS = 50, 20  # that are looked at for a pattern


def _pattern_of(name: str, kept: Collection[str]) -> str:
    """A pattern for `ignore` that matches `name` and its siblings, and none of `kept`."""
    parts = name.split(".", _MOST_PARTS)
    parents = (".".join(parts[:count]) + "." for count in range(1, len(parts)))
    free = (parent for parent in parents if not any(other.startswith(parent) for other in kept))
    return printable(f"{parent}*" if (parent := next(free, "")) else name)


def warn_of_assumptions(matched: MatchedNames, config: PoolFormerConfig, source: str) -> str | None:
    """Warns of assumptions about what arrays and layout do not show. Returns them in words, or None if there are none.

    transformers and timm have one norm and pooling for the first paper's networks. The authors' code has more, and our
    paths name any network. Raises InputError if the second paper has two networks with these arrays.
    """
    if config.downsample_norm:
        _check_second_paper(matched, config, source)
        return None
    if matched.layout not in ("sail", "jax"):
        return None
    assumed = f"norm={config.norm!r} and token_mixers={config.token_mixers}"
    warnings.warn(
        f"The arrays of {source} do not show its norm, nor whether its token mixers pool. Assumes {assumed}, and the "
        "published strides, pooling window and activation. The authors' ablations, such as poolformer_ln_s12 and "
        "poolformer_id_s12, have the same names and shapes as s12. --variant s12 says which network it is (in Python "
        "variant='s12' or config=...).",
        stacklevel=3,
    )
    return assumed


def _check_second_paper(matched: MatchedNames, config: PoolFormerConfig, source: str) -> None:
    variant = published_variant(config)
    if is_pooling_open(config):
        other = variant.replace("poolformerv2", "identityformer") if variant else ""
        by_name = f"variant={variant!r} or variant={other!r} (--variant {other}), or " if variant else ""
        raise InputError(
            f"PoolFormerV2 and IdentityFormer have arrays of the same names and shapes, and nothing about {source} "
            f"says which it is. Pass {by_name}config=MetaFormerConfig(...), or name the file or its folder "
            f"{other or 'identityformer_s12'}."
        )
    check_head_epsilon(matched, config, source)


def check_head_epsilon(matched: MatchedNames, config: PoolFormerConfig, source: str) -> None:
    """Raises InputError if neither a config nor the layout says what the LayerNorm of an MLP head computes."""
    fixed = LAYOUTS[matched.layout].fixed_fields(config)
    if config.head == "mlp" and config.num_labels and "head_norm_epsilon" not in fixed:
        raise InputError(
            f"{source} has an MLP head, and no array shows the epsilon of its LayerNorm: 1e-5 in the authors' code, "
            "1e-6 in timm. Expected the config.json that was saved with the weights, or "
            f"config=MetaFormerConfig.from_variant({published_variant(config) or 'caformer_s18'!r}, "
            "head_norm_epsilon=...)."
        )


def from_torch_state_dict(
    state_dict: Mapping[str, ArrayLike],
    config: PoolFormerConfig | None = None,
    *,
    ignore: Sequence[str] = (),
    param_dtype: DTypeLike | None = np.float32,
) -> tuple[PoolFormerConfig, dict[str, Any]]:
    """Turns a PyTorch state dict into a config and variables for `PoolFormerForImageClassification`.

    Layout (sail, transformers, timm), variant, number of classes and order of the head are inferred from names and
    shapes; the order of the names does not matter. A prefix of a wrapper (`module.`) is ignored. PoolFormerV2 and
    IdentityFormer have the same names and shapes, and need `config`.

    Some properties show in no array. They are assumed to be as published, with a warning for the authors' names, which
    ablations share (`poolformer_ln_s12`, `poolformer_id_s12`). Pass `config` for a network that differs:
    identity mixers (assumed to be pooling; `PoolFormerConfig.from_variant("metaformer_id_s12")` is such a config), the
    window of the pooling, activation, strides and padding. Networks with attention are assumed to normalise over
    channels.

    Args:
        state_dict: arrays by name, or tensors of PyTorch that NumPy can convert. Call
            `tensor.detach().cpu().float()` on those with a gradient (as `named_parameters()` gives them), on another
            device, or of bfloat16.
        config: the network; None to infer it.
        ignore: patterns ("criterion.*") of names to leave out, as in the shell.
        param_dtype: type of the parameters. float16 and bfloat16 become float32 exactly, float64 is rounded; None
            keeps the type of every array.

    Returns:
        The config, and `{"params": tree}` of NumPy arrays; RandFormer's matrices are in the collection "constants"
        beside it. A state dict of the backbone alone (transformers' PoolFormerModel) gives the tree of
        `PoolFormerModel`, and a config with num_labels=0.

    Raises:
        WeightsMismatch: naming everything that is missing, unexpected or misshaped.
        ValueError: if no known layout has these names, or a tensor cannot be converted.
    """
    state_dict = {name: state_dict[name] for name in names_to_read(state_dict, ignore)}
    matched = match_state_dict(state_dict)
    plan = plan_import(matched, config)
    if config is None:
        warn_of_assumptions(matched, plan.config, "this state dict")
    return plan.config, plan.read(state_dict, param_dtype)


def _read_leaf(leaf: Leaf, stored: ArrayLike, param_dtype: DTypeLike | None) -> np.ndarray:
    try:
        given = np.asarray(stored)
    except (TypeError, RuntimeError) as error:  # PyTorch's, for a type that NumPy lacks and for tensors with gradients
        raise InputError(
            f"{leaf.name} cannot be converted to a NumPy array ({printable(str(error))}). Expected arrays, or "
            "tensors on the CPU without gradient, of a type that NumPy has: tensor.detach().cpu().float()."
        ) from error
    array = TRANSFORMS[leaf.transform].to_tree(given)
    return np.array(array, dtype=param_dtype or array.dtype, order="C")


def to_torch_state_dict(config: PoolFormerConfig, variables: Mapping[str, Any], layout: str) -> dict[str, np.ndarray]:
    """Turns variables into a state dict; the exact inverse of `from_torch_state_dict`, bit for bit.

    Args:
        config: the network.
        variables: `{"params": tree}`, of the classifier or of the backbone alone, with "constants" for RandFormer.
        layout: "sail", "hf" or "timm"; "jax" gives the '/'-joined paths of the tree. timm's PoolFormer pools before
            it normalises, so its logits differ from those of sail's and transformers' models with the same weights.

    Returns:
        Contiguous copies by name, in the order of that library's state dict.

    Raises:
        WeightsMismatch: naming every leaf that is missing, unexpected or misshaped.
        ValueError: if the layout has no names for a part of the network.
    """
    return {name: np.array(array, order="C") for name, array in stored_views(config, variables, layout)}


def stored_views(
    config: PoolFormerConfig, variables: Mapping[str, Any], layout: str, *, classifier: bool | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """As `to_torch_state_dict`, one array at a time, and each a view of the tree's memory.

    `classifier=None` infers it from the tree: a backbone has no final norm.
    """
    tree = leaves_by_path(config, variables, classifier=classifier)
    expected = leaves(config, layout, classifier="norm/scale" in tree)
    return ((leaf.name, TRANSFORMS[leaf.transform].to_layout(np.asarray(tree[leaf.path]))) for leaf in expected)

"""The parameters of one network: `parameter_table` applied to a config. No array is made here, and no jax imported."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from poolformer_jax.errors import InputError
from poolformer_jax.network.config import PoolFormerConfig
from poolformer_jax.network.mismatch import check_names_and_shapes
from poolformer_jax.network.parameter_table import BLOCK, NETWORK, PARAMS, STAGE, ParameterRow, backbone_rows, head_rows


class InitialValues(NamedTuple):
    """The initial values of a parameter."""

    # "uniform" from -size to size, "normal" with standard deviation `size`, "constant", or "mixing": the softmax over
    # the first axis of uniform numbers in [0, size).
    distribution: str
    size: float  # the bound, the standard deviation, or the constant


class Parameter(NamedTuple):
    """One parameter of one network."""

    row: ParameterRow  # its row of the table
    path: str  # its path in the tree, such as "stages_0/blocks_1/norm1/scale"
    stage: int  # the index of its stage; outside the stages, of the stage that its sizes come from
    block: int  # the index of its block in the stage; 0 outside the blocks
    shape: tuple[int, ...]
    initial: InitialValues


def all_parameters(config: PoolFormerConfig, *, classifier: bool = True) -> tuple[Parameter, ...]:
    """Every parameter of the network: the stem, stage by stage, then norm and head.

    `classifier=False` leaves out the final norm and the head.
    """
    groups = (backbone_rows(), head_rows())
    return tuple(found for rows in groups for found in parameters_of_rows(config, rows, classifier=classifier))


def parameters_of_rows(
    config: PoolFormerConfig, rows: Iterable[ParameterRow], *, classifier: bool = True
) -> Iterator[Parameter]:
    """The parameters of some rows of the table: those outside the stages, then stage by stage and block by block."""
    rows = tuple(rows)
    for stage, depth in enumerate(config.depths):
        for place, blocks in ((NETWORK, int(stage == 0)), (STAGE, 1), (BLOCK, depth)):
            at_place = [row for row in rows if row.place == place]
            for block in range(blocks if at_place else 0):
                for row in at_place:
                    at = _stage_of(config, row, stage)
                    if is_present(config, row, at, classifier=classifier):
                        yield _parameter(config, row, at, block)


def subtree(config: PoolFormerConfig, place: str, stage: int = 0, *, classifier: bool = True) -> dict[str, Any]:
    """The parameters at one place of the tree, as nested dictionaries by the parts of their names.

    Args:
        config: the network.
        place: `NETWORK` (stem, norm and head), `STAGE` (what a stage has outside its blocks) or `BLOCK`.
        stage: the index of the stage.
        classifier: as in `all_parameters`.
    """
    tree: dict[str, Any] = {}
    rows = [row for row in (*backbone_rows(), *head_rows()) if row.place == place]
    for row in rows:
        at = _stage_of(config, row, stage)
        if is_present(config, row, at, classifier=classifier):
            *parents, name = row.name.split("/")
            branch = tree
            for parent in parents:
                branch = branch.setdefault(parent, {})
            branch[name] = _parameter(config, row, at, 0)
    return tree


def count_parameters(config: PoolFormerConfig, collection: str = PARAMS) -> int:
    """How many numbers the classifier trains, or with `CONSTANTS` how many it only stores."""
    return sum(
        math.prod(parameter.shape) for parameter in all_parameters(config) if parameter.row.collection == collection
    )


def variables_of(config: PoolFormerConfig, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a model: `{"params": tree}`, and "constants" beside it if the network has any.

    `leaves` has a value for each of its parameters, by '/'-joined path.
    """
    collections = {parameter.path: parameter.row.collection for parameter in all_parameters(config)}
    variables: dict[str, Any] = {PARAMS: {}}
    for path, value in leaves.items():
        *parents, name = path.split("/")
        branch = variables.setdefault(collections[path], {})
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = value
    return variables


def merge_collections(variables: Mapping[str, Any]) -> dict[str, Any]:
    """One tree with the arrays of all collections, whose paths differ."""
    merged: dict[str, Any] = {}
    for tree in variables.values():
        _merge_into(merged, tree)
    return merged


def _merge_into(merged: dict[str, Any], tree: Mapping[str, Any]) -> None:
    for name, branch in tree.items():
        if isinstance(branch, Mapping):
            _merge_into(merged.setdefault(name, {}), branch)
        else:
            merged[name] = branch


def is_present(config: PoolFormerConfig, row: ParameterRow, stage: int, *, classifier: bool = True) -> bool:
    """True if the network has the parameters of a row in this stage."""
    conditions = {
        "always": True,
        "after the first stage": stage > 0,
        "position embedding": config.position_embeddings[stage],
        "layer scale": config.use_layer_scale,
        "residual scale": _residual_scale(config, stage) is not None,
        "stem norm": config.downsample_norm,
        "downsample norm": config.downsample_norm and stage > 0,
        "norm bias": config.norm_bias,
        "mlp bias": config.mlp_bias,
        "star relu": config.hidden_act == "star_relu",
        "attention bias": config.attention_bias and config.token_mixers[stage] == "attention",
        "classifier": classifier,
        "linear head": classifier and config.num_labels > 0 and config.head == "linear",
        "mlp head": classifier and config.num_labels > 0 and config.head == "mlp",
    }
    return conditions.get(row.when, config.token_mixers[stage] == row.when)


def check_variables(config: PoolFormerConfig, variables: Mapping[str, Any]) -> None:
    """Checks that `variables` have the names and shapes of the classifier that `config` describes.

    Raises WeightsMismatch, naming every leaf that is missing, unexpected or misshaped; ValueError if they do not have
    the collections of such a network: "params", and "constants" if it has any.
    """
    leaves_by_path(config, variables, classifier=True)


def leaves_by_path(
    config: PoolFormerConfig, variables: Mapping[str, Any], *, classifier: bool | None = None
) -> dict[str, Any]:
    """The leaves of `variables` by their '/'-joined paths, with the names and shapes of the config's network.

    Args:
        config: the network.
        variables: of the classifier, or of only the backbone.
        classifier: which of the two they must be; None for either. Only the classifier has a final norm.

    Raises:
        WeightsMismatch: naming every leaf that is missing, unexpected or misshaped.
        ValueError: if the collections are not those of such a network.
    """
    collections = sorted({parameter.row.collection for parameter in all_parameters(config)}, reverse=True)
    if set(variables) != set(collections):
        trees = ", ".join(f"{name!r}: tree" for name in collections)
        raise InputError(
            f"variables holds {sorted(variables) or 'nothing'}. Expected {{{trees}}} and nothing else, as model.init "
            "and load_pretrained return."
        )
    leaves = {path: leaf for tree in variables.values() for path, leaf in _flatten(tree)}
    if classifier is None:
        classifier = any(path.startswith("norm/") for path in leaves)
    check_names_and_shapes(
        "The variables do not match the config:",
        {path: np.shape(leaf) for path, leaf in leaves.items()},
        {parameter.path: parameter.shape for parameter in all_parameters(config, classifier=classifier)},
    )
    return leaves


def _flatten(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, branch in tree.items():
        if isinstance(branch, Mapping):
            yield from _flatten(branch, f"{above}{name}/")
        else:
            yield f"{above}{name}", branch


def _stage_of(config: PoolFormerConfig, row: ParameterRow, stage: int) -> int:
    """The stage that the sizes come from: `stage`, but outside the stages the first one (stem) or the last one."""
    if row.place != NETWORK:
        return stage
    return 0 if row.name.startswith("stem/") else len(config.depths) - 1


def _parameter(config: PoolFormerConfig, row: ParameterRow, stage: int, block: int) -> Parameter:
    sizes = _sizes(config, stage)
    shape = tuple(_size(symbol, sizes) for symbol in row.shape)
    initial = _initial_values(config, row, stage, sizes)
    return Parameter(row, row.path.format(s=stage, b=block), stage, block, shape, initial)


def _size(symbol: str, sizes: Mapping[str, int]) -> int:
    """The length of a dimension: "c", "3c" or "7"."""
    factor, letter = re.fullmatch(r"(\d*)([a-z]?)", symbol).groups()  # type: ignore[union-attr]
    return int(factor or 1) * (sizes[letter] if letter else 1)


def _sizes(config: PoolFormerConfig, stage: int) -> dict[str, int]:
    """What the letters in the table's shapes stand for in one stage."""
    side = config.feature_sizes(config.image_size)[stage] if config.image_size else 0
    return {
        "k": config.patch_sizes[stage],
        "i": config.hidden_sizes[stage - 1] if stage else config.num_channels,
        "c": config.hidden_sizes[stage],
        "m": config.mlp_hidden_sizes[stage],
        "h": side,
        "w": side,
        "n": side * side,
        "l": config.num_labels,
    }


def _residual_scale(config: PoolFormerConfig, stage: int) -> float | None:
    scales = config.residual_scale_init_values
    return None if scales is None else scales[stage]


def _initial_values(config: PoolFormerConfig, row: ParameterRow, stage: int, sizes: Mapping[str, int]) -> InitialValues:
    uniform = InitialValues("uniform", 1 / math.sqrt(sizes["k"] ** 2 * sizes["i"]))
    # The authors truncate it at ±2: a hundred standard deviations, so no value is affected.
    normal, zeros = InitialValues("normal", 0.02), InitialValues("constant", 0.0)
    torch = config.convolution_init == "torch"
    return {
        "convolution": uniform if torch else normal,
        "convolution bias": uniform if torch else zeros,
        "normal": normal,
        "zeros": zeros,
        "ones": InitialValues("constant", 1.0),
        "layer scale": InitialValues("constant", config.layer_scale_init_value),
        "residual scale": InitialValues("constant", _residual_scale(config, stage) or 0.0),
        "random mixing": InitialValues("mixing", 1.0),
    }[row.initial]

"""Applies a table of `names.py` in either direction, every leaf exactly once.

Arrays only: files are read in `files.py`, and nothing here knows the model. What does not fit is collected and told
at once, with the nearest name that is there.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from flax.traverse_util import unflatten_dict
from numpy.typing import DTypeLike

from poolformer_jax.errors import InputError
from poolformer_jax.fields import first_few
from poolformer_jax.network import PoolFormerConfig, check_names_and_shapes, leaves_by_path
from poolformer_jax.weights.containers.storage import plain
from poolformer_jax.weights.detection import Detection, network_of_names, read_names
from poolformer_jax.weights.names import TRANSFORMS, Leaf, leaves


@runtime_checkable
class ArrayLike(Protocol):
    """An array, or anything that knows its shape and type and becomes one with `numpy.asarray`.

    A tensor that is still in its file is one too (`files.StoredTensor`): it is read when its turn comes.
    """

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> Any: ...


@dataclass(frozen=True)
class ImportPlan:
    """Which array of a state dict becomes which leaf of the parameter tree.

    Args:
        detection: layout and network.
        leaves: every parameter of the network, in the order of the layout.
    """

    detection: Detection
    leaves: tuple[Leaf, ...]

    def given_name(self, leaf: Leaf) -> str:
        """The state dict's own name for `leaf`, with the prefix it has there."""
        return self.detection.names[leaf.name]


def plan_import(state_dict: Mapping[str, ArrayLike], config: PoolFormerConfig | None = None) -> ImportPlan:
    """Matches the names and shapes of `state_dict` with a network, and reads none of its values.

    Args:
        state_dict: arrays by PyTorch name (or this package's), in any order.
        config: the network; None to work it out.

    Raises:
        WeightsMismatch: if a name is missing or left over, or a shape differs.
        ValueError: if the names are of no known layout.
    """
    shapes = {name: tuple(array.shape) for name, array in state_dict.items()}
    read = read_names(shapes)
    # Of what is no parameter of a PoolFormer, such as a count of batches, more is told below than its type.
    _refuse_quantized({name: state_dict[name] for name in read.explained})
    detection = network_of_names(read, config)
    if (blocks := sum(detection.config.depths)) > len(shapes):
        # Told before a list is made of every parameter of a config that may come from a file too.
        raise InputError(
            f"The config given has depths {str(detection.config.depths)[:80]}, {str(blocks)[:40]} blocks in all, and "
            f"these weights are {len(shapes)} arrays. Expected the config of these weights."
        )
    expected = leaves(detection.config, detection.layout, classifier=detection.classifier)
    given = {name: shapes[original] for name, original in detection.names.items()}
    network = detection.variant or "non-standard PoolFormer"
    source = "the config given" if config else "its names and shapes"
    check_names_and_shapes(
        f"These weights are not those of the {network} in the layout of {detection.layout} that {source} tell of:",
        given,
        {leaf.name: leaf.stored_shape for leaf in expected},
    )
    return ImportPlan(detection, expected)


def _refuse_quantized(state_dict: Mapping[str, ArrayLike]) -> None:
    """Whole numbers are weights of another meaning: a quantized network's, which a scale belongs to."""
    # "float32" is np.float32's name, and "torch.float32" how PyTorch writes its own.
    types = {
        name: str(getattr(array.dtype, "name", array.dtype)).removeprefix("torch.")
        for name, array in state_dict.items()
    }
    if wrong := [f"{plain(name)} ({kind})" for name, kind in types.items() if "float" not in kind]:
        raise InputError(
            f"These weights are no floating-point numbers: {first_few(wrong, 3)}. Expected float16, bfloat16, 32 or 64."
        )


def from_torch_state_dict(
    state_dict: Mapping[str, ArrayLike],
    config: PoolFormerConfig | None = None,
    *,
    param_dtype: DTypeLike | None = np.float32,
) -> tuple[PoolFormerConfig, dict[str, Any]]:
    """Turns a PyTorch state dict into a config and variables for `PoolFormerForImageClassification`.

    Layout (sail, transformers, timm), variant, classes and order of the head are worked out from names and shapes;
    their order does not matter. Prefixes of wrappers (`module.`) are passed over.

    Some things show in no array, and are read as the published networks have them: pass `config=` for others. Pooling
    and identity mixers look alike and are read as pooling, so that `PoolFormerConfig.from_variant("metaformer_id_s12")`
    is such a config; so are other windows of the pooling, activations, strides and padding. Networks with attention
    are read as normalising over channels.

    Args:
        state_dict: arrays by name. Tensors of PyTorch do that NumPy takes: `tensor.detach().cpu().float()` the others
            (with a gradient, as `named_parameters()` gives them; elsewhere than on the CPU; of bfloat16).
        config: the network, where the arrays do not tell it.
        param_dtype: type of the parameters. float16 and bfloat16 become float32 without a change of value, float64 is
            rounded; None keeps every array's own type.

    Returns:
        The config, and `{"params": tree}` of NumPy arrays. A state dict of the backbone alone (transformers'
        PoolFormerModel) gives the tree of `PoolFormerModel`, and a config with num_labels=0.

    Raises:
        WeightsMismatch: naming everything that is missing, unexpected or misshaped.
        ValueError: if the names are of no known layout, or a tensor becomes no array.
    """
    plan = plan_import(state_dict, config)
    params = {leaf.path: read_leaf(leaf, state_dict[plan.given_name(leaf)], param_dtype) for leaf in plan.leaves}
    return plan.detection.config, {"params": unflatten_dict(params, sep="/")}


def read_leaf(leaf: Leaf, stored: ArrayLike, param_dtype: DTypeLike | None = np.float32) -> np.ndarray:
    """One array as the parameter tree holds it: laid out for it, contiguous, and the caller's own."""
    try:
        given = np.asarray(stored)
    except (TypeError, RuntimeError) as error:  # of PyTorch: NumPy has no such type, or a gradient would be lost
        raise InputError(
            f"What is given for {leaf.name} becomes no array ({plain(str(error))}). Expected arrays, or tensors on the "
            "CPU without gradient, of a type that NumPy has: tensor.detach().cpu().float()."
        ) from error
    array = TRANSFORMS[leaf.transform].here(given)
    return np.array(array, dtype=param_dtype or array.dtype, order="C")


def to_torch_state_dict(config: PoolFormerConfig, variables: Mapping[str, Any], layout: str) -> dict[str, np.ndarray]:
    """Turns variables into a state dict; the exact inverse of `from_torch_state_dict`, bit for bit.

    Args:
        config: the network.
        variables: `{"params": tree}`, of the classifier or of the backbone alone.
        layout: "sail", "hf" or "timm" ("jax" gives the tree's own '/'-joined names). timm's model pools before it
            normalises, so that the same weights compute other logits there than in sail's and transformers'.

    Returns:
        Contiguous arrays by name, the caller's own, in the order of that home's state dict.

    Raises:
        WeightsMismatch: naming every leaf that is missing, unexpected or misshaped.
        ValueError: if the layout has no name for a part of the network.
    """
    return {name: np.array(array, order="C") for name, array in stored_views(config, variables, layout)}


def stored_views(
    config: PoolFormerConfig, variables: Mapping[str, Any], layout: str, *, classifier: bool | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """As `to_torch_state_dict`, one array at a time, and each a view of the tree's own memory.

    The backbone's tree has no final norm, and that is how the two are told apart where `classifier` is None.
    """
    tree = leaves_by_path(config, variables, classifier=classifier)
    expected = leaves(config, layout, classifier="norm/scale" in tree)
    return ((leaf.name, TRANSFORMS[leaf.transform].there(np.asarray(tree[leaf.path]))) for leaf in expected)

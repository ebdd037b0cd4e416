"""The network that a run trains: a fresh one, or one whose weights are there already."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from poolformer_jax import PoolFormerConfig, PoolFormerForImageClassification, TpuKernels, load_pretrained
from poolformer_jax.checks import refuse

ComputeType = Literal["float32", "bfloat16", "float64"]
# Classes that a message about differing ones lists.
_MOST_LINES = 10
# What `prepare` adds to the two classes of ImageNet that are both called crane.
_WORDNET_ID = re.compile(r" \(n\d{8}\)$")


@dataclasses.dataclass(frozen=True)
class FreshNetwork(PoolFormerConfig):
    """A network with new weights. What follows from the data is no flag: labels, their names, and channels."""

    num_channels: tyro.conf.Suppress[int] = 3
    num_labels: tyro.conf.Suppress[int] = 0
    id2label: tyro.conf.Suppress[Mapping[int, str] | None] = None


@dataclasses.dataclass(frozen=True)
class PretrainedNetwork:
    """Weights to go on from, with a new head for the classes of the data."""

    source: str = "sail/poolformer_s12"
    """What load_pretrained opens: a model on the Hub (sail/poolformer_s12), a model folder, or a weights file."""
    use_ema: bool = False
    """Take the running mean of the weights, where the file has one."""
    keep_head: bool = False
    """Go on with the head as well. Its classes must be those of the data, in their order."""
    drop_path_rate: float = 0.1
    """Probability of dropping the last block's residual branches; it grows linearly from 0 over all blocks."""
    dropout_rate: float = 0.0
    """Dropout after both layers of the MLP."""

    def __post_init__(self) -> None:
        rules = [
            ("source", bool(self.source), "the name of a model, or a path"),
            ("drop_path_rate", 0 <= self.drop_path_rate < 1, "a probability in [0, 1)"),
            ("dropout_rate", 0 <= self.dropout_rate < 1, "a probability in [0, 1)"),
        ]
        refuse(self, rules)


@dataclasses.dataclass(frozen=True)
class Network:
    """A network and where its first parameters come from.

    Attributes:
        model: the network, in the run's compute type.
        make_params: its parameters, from `argument`; traceable, so that they can be made where they are to live.
        argument: what `make_params` takes: a key, or the parameters that were read.
    """

    model: PoolFormerForImageClassification
    make_params: Callable[[Any], Any]
    argument: Any


def make_network(
    wanted: FreshNetwork | PretrainedNetwork,
    class_names: Sequence[str],
    image_size: int,
    num_channels: int,
    dtype: ComputeType,
    remat: bool,
    kernels: TpuKernels | None,
    seed: int,
) -> Network:
    """The network for data with `class_names` and images of `image_size` pixels; labels and channels follow the data.

    Raises:
        ValueError: if there is nothing to tell apart, or the weights are of a network for other images or classes.
    """
    if len(class_names) < 2:
        raise ValueError(
            f"The data has {len(class_names)} class, {', '.join(class_names)}: every answer would be right. Expected "
            "two or more; of class folders name the folder that holds one folder per class."
        )
    kind = jnp.dtype(dtype)
    if kind == jnp.float64 and not jax.config.jax_enable_x64:
        raise ValueError("dtype='float64' needs the environment variable JAX_ENABLE_X64=1. Expected it, or float32.")
    wide = jnp.promote_types(kind, jnp.float32)
    labels = {"num_labels": len(class_names), "id2label": dict(enumerate(class_names))}

    if isinstance(wanted, PretrainedNetwork):
        loaded, variables = _load(wanted, class_names, jax.random.key(seed))
        if loaded.config.num_channels != num_channels:
            raise ValueError(
                f"{wanted.source} takes images of {loaded.config.num_channels} channels, and data.image_mean has "
                f"{num_channels} values. Expected as many."
            )
        rates = {"drop_path_rate": wanted.drop_path_rate, "dropout_rate": wanted.dropout_rate}
        config = dataclasses.replace(loaded.config, **labels, **rates)
        model = PoolFormerForImageClassification(config, dtype=kind, remat=remat, kernels=kernels)
        # NumPy's, because a process's own device arrays cannot become arrays of all processes.
        params = jax.tree.map(np.asarray, variables["params"])
        return Network(model, lambda params: jax.tree.map(lambda p: p.astype(wide), params), params)

    fields = {field.name: getattr(wanted, field.name) for field in dataclasses.fields(PoolFormerConfig)}
    config = PoolFormerConfig(**{**fields, **labels, "num_channels": num_channels})
    model = PoolFormerForImageClassification(config, dtype=kind, remat=remat, kernels=kernels)

    def fresh(key: jax.Array) -> Any:
        pixels = jnp.zeros((1, image_size, image_size, num_channels), kind)
        return jax.tree.map(lambda p: p.astype(wide), model.init(key, pixels)["params"])

    return Network(model, fresh, jax.random.key(seed))


def _load(
    wanted: PretrainedNetwork, class_names: Sequence[str], key: jax.Array
) -> tuple[PoolFormerForImageClassification, Any]:
    count = len(class_names)
    if not wanted.keep_head:
        return load_pretrained(wanted.source, num_labels=count, reset_head=True, key=key, use_ema=wanted.use_ema)
    loaded, variables = load_pretrained(wanted.source, use_ema=wanted.use_ema)
    remedy = "leave --model.keep-head away to start with a new head"
    if loaded.config.num_labels != count:
        raise ValueError(
            f"The head of {wanted.source} is for {loaded.config.num_labels} classes, and the data has {count}. "
            f"Expected the same number; {remedy}."
        )
    refuse_other_classes(wanted.source, loaded.config, "the data", class_names, remedy)
    return loaded, variables


def refuse_other_classes(
    source: str, config: PoolFormerConfig, data: str, class_names: Sequence[str], remedy: str
) -> None:
    """Checks that a model's labels mean the data's classes, as far as their names can tell.

    Lists without a name in common are two vocabularies: ImageNet's folders are called by WordNet ids and its labels by
    words, and only the number of classes can be compared. With one in common they have to be equal.

    Args:
        source: the model, for messages.
        config: of the model; as many labels as there are classes.
        data: the data, for messages.
        class_names: the data's, in the order of its labels.
        remedy: what else can be done than renaming.

    Raises:
        ValueError: naming the labels that differ.
    """
    if config.id2label is None:
        return
    names = [config.id2label[label] for label in range(config.num_labels)]
    plain, wanted = [[_WORDNET_ID.sub("", name) for name in one] for one in (names, class_names)]
    if plain == wanted or not set(plain) & set(wanted):
        return
    what = "the same classes in another order" if sorted(plain) == sorted(wanted) else "some classes in common only"
    different = [label for label, (one, other) in enumerate(zip(plain, wanted)) if one != other]
    lines = [f"label {label}: {names[label]} in the model, {class_names[label]} in the data" for label in different]
    more = [f"and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    raise ValueError(
        f"{source} and {data} have {what}, so labels would not agree:\n  "
        + "\n  ".join(lines[:_MOST_LINES] + more)
        + f"\nExpected the same classes in the same order (class folders: sorted by name). Rename them, or {remedy}."
    )

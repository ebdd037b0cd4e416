"""The network that a run trains, and its initial variables: new ones, or pretrained weights."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from poolformer_jax import PoolFormerConfig, PoolFormerForImageClassification
from poolformer_jax.errors import InputError
from poolformer_jax.weights import build_model, open_model
from train.config import PretrainedNetwork, TrainConfig
from train.data import DataConfig, check_same_classes
from train.folders import refuse_run_folder
from train.preprocessing import warn_of_other_preprocessing


@dataclasses.dataclass(frozen=True)
class Network:
    """A network and the source of its initial variables."""

    model: PoolFormerForImageClassification  # the network, in the run's compute type
    # Its variables, from a key or from pretrained ones; traceable, so that jit can place them.
    make_variables: Callable[[Any], Any]
    # Returns the argument of `make_variables` for a new run. It may read pretrained weights, which a resumed run does
    # not need.
    argument: Callable[[], Any]


def make_network(
    config: TrainConfig,
    class_names: Sequence[str],
    fused: bool = True,
    checkpoint_network: PoolFormerConfig | None = None,
) -> Network:
    """The network of a run; its labels and channels follow the data.

    With `checkpoint_network`, the network of the checkpoint to resume from, pretrained weights are not read. Raises
    ValueError if there are fewer than two classes, or the weights are of a network for other images or classes.
    """
    if len(class_names) < 2 and not config.data.has_target_vectors:
        raise InputError(
            f"The data has {len(class_names)} class, {', '.join(class_names)}: every answer would be right. Expected "
            "two or more; of class folders name the folder that holds one folder per class."
        )
    dtype = jnp.dtype(config.dtype)
    if dtype == jnp.float64 and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise InputError("dtype='float64' needs the environment variable JAX_ENABLE_X64=1. Expected it, or float32.")
    wanted, size, channels = config.model, config.data.image_size, config.data.num_channels
    key = jax.random.key(config.seed)

    @functools.cache
    def initial() -> tuple[PoolFormerConfig, Any]:
        if isinstance(wanted, PretrainedNetwork):
            return _load(wanted, class_names, config.data, key)
        fields = dataclasses.fields(PoolFormerConfig)
        return PoolFormerConfig(**{field.name: getattr(wanted, field.name) for field in fields}), key

    architecture = dataclasses.replace(
        checkpoint_network or initial()[0],
        num_labels=len(class_names),
        id2label=dict(enumerate(class_names)),
        num_channels=channels,
    )
    if config.data.has_target_vectors:
        architecture = dataclasses.replace(architecture, problem_type=config.data.problem_type)
    model = PoolFormerForImageClassification(architecture, dtype=dtype, remat=config.remat, fused=fused)

    def make_variables(argument: Any) -> Any:
        read = isinstance(argument, dict)
        variables = argument if read else model.init(argument, jnp.zeros((1, size, size, channels), dtype))
        return jax.tree.map(lambda array: array.astype(jnp.promote_types(dtype, jnp.float32)), variables)

    return Network(model, make_variables, argument=lambda: initial()[1])


def _load(
    wanted: PretrainedNetwork, class_names: Sequence[str], data: DataConfig, key: jax.Array
) -> tuple[PoolFormerConfig, Any]:
    """The config and the variables of the pretrained network, with the drop rates of `wanted`."""
    refuse_run_folder(wanted.source)
    opened = open_model(wanted.source, variant=wanted.variant, ignore=wanted.ignore, use_ema=wanted.use_ema)
    if wanted.keep_head:
        loaded, variables = build_model(opened)
        remedy = "leave --model.keep-head away to start with a new head"
        check_same_classes(wanted.source, loaded.config, "the data", class_names, remedy, data.class_map is not None)
    else:
        loaded, variables = build_model(opened, num_labels=len(class_names), reset_head=True, key=key)
    if loaded.config.num_channels != data.num_channels:
        raise InputError(
            f"{wanted.source} takes images of {loaded.config.num_channels} channels, and data.image_mean has "
            f"{data.num_channels} values. Expected one value per channel."
        )
    if jax.process_index() == 0:
        warn_of_other_preprocessing(opened, data)
    config = dataclasses.replace(
        loaded.config,
        drop_path_rate=wanted.drop_path_rate,
        dropout_rate=wanted.dropout_rate,
        head_dropout_rate=wanted.head_dropout_rate,
        problem_type=None,  # the data says what the run trains for
    )
    # As NumPy arrays, because arrays on this process's devices cannot become arrays of all processes.
    return config, jax.tree.map(np.asarray, variables)

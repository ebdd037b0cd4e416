"""The parts of a run, made from its recipe: mesh, network, shardings of the state, and the compiled functions.

The loop and the doctor share them, so the doctor measures what the loop runs.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from poolformer_jax import PoolFormerConfig, PoolFormerForImageClassification
from poolformer_jax.compilation import compiler_options
from poolformer_jax.errors import InputError
from poolformer_jax.network import kernel_stages
from poolformer_jax.network.fused import Verification, choose_kernels
from poolformer_jax.resources import format_bytes, free_memory
from train.compute import (
    BATCH_AXES,
    EvaluationStep,
    FeatureClassifier,
    FeatureStep,
    TrainState,
    batch_sharding,
    check_batch,
    learns_from_features,
    make_evaluation_step,
    make_feature_step,
    make_mesh,
    make_optimizer,
    make_schedule,
    make_train_step,
    new_state,
    processes_where,
    replicated,
    state_shardings,
)
from train.config import TrainConfig
from train.data import DataConfig, Source, augment_batch, balanced_weights, make_targets, normalize_batch
from train.network import Network, make_network


@dataclasses.dataclass(frozen=True)
class RunParts:
    """The parts of a run."""

    mesh: Mesh  # all devices
    network: Network  # the model, and the source of its initial variables
    # The comparison of the devices' kernels with XLA, the same on all processes; None without.
    kernel_verification: Verification | None
    abstract_state: TrainState  # shapes, types and shardings of the state, without memory
    init: Callable[[Any], TrainState]  # compiled; makes the state from `network.argument()`, sharded
    step: jax.stages.Wrapped  # the compiled training step, (state, `Batch`) -> (state, `Metrics`); the state is donated
    evaluation_step: EvaluationStep  # the compiled sums over an evaluation batch
    # Compiled; from the variables and images to features. If it is not None, both other steps take features as images.
    feature_step: FeatureStep | None = None


def make_parts(
    config: TrainConfig,
    class_names: Sequence[str],
    examples: int,
    devices: Sequence[jax.Device] | None = None,
    fused: bool = True,
    checkpoint_network: PoolFormerConfig | None = None,
    class_weights: tuple[float, ...] | None = None,
    use_features: bool = False,
) -> RunParts:
    """The parts of a run.

    `fused=False` computes blocks as the paper writes them, to compare. With `checkpoint_network`, the network of the
    checkpoint to resume from, pretrained weights are not read. `use_features` trains on features that are computed
    once. Raises ValueError if devices, batch, data and network do not fit each other.
    """
    data = config.data
    mesh = make_mesh(config.mesh, devices)
    check_batch(mesh, data.batch_size, config.optimizer.accumulate)
    check_batch(mesh, data.evaluation_size, 1, "data.evaluation_batch_size")
    network, verification = _with_kernels(make_network(config, class_names, fused, checkpoint_network), config, mesh)
    optimizer = make_optimizer(config.optimizer)
    schedule = make_schedule(config.optimizer, config.steps_per_epoch(examples), data.batch_size)
    keeps_ema = config.optimizer.ema_decay is not None

    def init(argument: Any) -> TrainState:
        variables, keeps_best = network.make_variables(argument), config.keep_best is not None
        return new_state(variables["params"], optimizer, keeps_ema, variables.get("constants"), keeps_best)

    # Pretrained weights have the shapes of new parameters, and trace faster if they have been read.
    shapes = jax.eval_shape(init, jax.random.key(config.seed) if checkpoint_network else network.argument())
    shardings = state_shardings(mesh, shapes, config.mesh.fsdp_min_size)
    dtype = jnp.dtype(config.dtype)
    augment: Any = functools.partial(augment_batch, config=data, num_classes=len(class_names), dtype=dtype)
    normalize: Any = functools.partial(normalize_batch, config=data, dtype=dtype)
    feature_step = None
    model: PoolFormerForImageClassification | FeatureClassifier = network.model
    if use_features and learns_from_features(config, model.config, shapes.params, examples):
        feature_step = make_feature_step(network.model, normalize, mesh, shardings.variables())
        model = FeatureClassifier(model.config)
        augment = functools.partial(_make_targets, config=data, num_classes=len(class_names))
        normalize = _as_it_is
    step = make_train_step(
        model, optimizer, schedule, augment, config.optimizer, config.seed, mesh, shardings.params, class_weights
    )
    return RunParts(
        mesh=mesh,
        network=network,
        kernel_verification=verification,
        abstract_state=jax.tree.map(_place, shapes, shardings),
        init=jax.jit(init, out_shardings=shardings),
        step=_compiled(step, mesh, shardings),
        evaluation_step=make_evaluation_step(model, normalize, mesh, shardings.variables()),
        feature_step=feature_step,
    )


def check_memory(parts: RunParts) -> None:
    """Raises InputError if a device cannot hold the weights and the state of the optimizer, before there are any.

    A step needs more: `doctor` compiles it to say how much.
    """
    device = parts.mesh.local_devices[0]
    needed = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(parts.abstract_state)
    )
    # CPU devices share the host's memory.
    free = (device.memory_stats() or {}).get("bytes_limit") or free_memory() / len(parts.mesh.local_devices)
    if needed > free:
        raise InputError(
            f"The weights and the state of the optimizer need {format_bytes(needed)} on each device, which has "
            f"{format_bytes(free)}. Expected a smaller network, or a larger --mesh.fsdp."
        )


def _compiled(step: Callable[..., Any], mesh: Mesh, shardings: TrainState) -> Any:
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(mesh.devices.flat[0].platform, training=True),
    )


def _make_targets(
    key: jax.Array, features: jax.Array, labels: jax.Array, config: DataConfig, num_classes: int
) -> tuple[jax.Array, jax.Array]:
    """`augment_batch` for features, which stay as they are."""
    return features, make_targets(labels, num_classes, config)


def _as_it_is(features: jax.Array) -> jax.Array:
    return features


def find_class_weights(config: TrainConfig, source: Source) -> tuple[float, ...] | None:
    """The weight of each class in the training loss; None without `--data.class-weights`.

    Raises InputError if a class has no image.
    """
    return tuple(balanced_weights(source).tolist()) if config.data.class_weights == "balanced" else None


def _with_kernels(network: Network, config: TrainConfig, mesh: Mesh) -> tuple[Network, Verification | None]:
    """The network with the kernels that `config.kernels` chooses."""
    side = config.data.image_size
    kernels, verification = choose_kernels(
        config.kernels,
        mesh,
        BATCH_AXES,
        jnp.dtype(config.dtype),
        kernel_stages(network.model.config, (side, side), train=True),
        gradients=True,
        agree=_agree_on_verification,
    )
    return dataclasses.replace(network, model=network.model.clone(kernels=kernels)), verification


def _agree_on_verification(verification: Verification) -> Verification:
    """This process's verification, with a problem if any process has one: all of them run the same program."""
    failed = processes_where(verification.problem is not None)
    if not failed or verification.problem is not None:
        return verification
    return dataclasses.replace(verification, problem=f"see the logs of the processes {failed}")


def _place(shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

"""The doctor's checks of memory and disk: what a run needs, compared with what this host and its devices have."""

import dataclasses
import functools
import math
import pickle
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from poolformer_jax.fields import is_local
from poolformer_jax.resources import format_bytes, free_memory
from train.commands.finding import Finding
from train.compute import batch_sharding
from train.config import TrainConfig
from train.data import SHARED_MEMORY_ADVICE, Source, batch_bytes, max_shared_batches, worker_count
from train.resume import saved_steps
from train.setup import RunParts

# A worker process without batches: Python, NumPy, Pillow and Grain, with a margin.
_WORKER_BYTES = 150e6


@dataclasses.dataclass(frozen=True)
class _WorkerPool:
    """The workers of training or of evaluations."""

    workers: int  # number of processes
    batch_bytes: float  # size of one batch of this process
    shared_batches: int  # most batches in shared memory at a time
    private_batches: int  # most other batches at a time
    process_bytes: float  # memory of all worker processes without batches


def check_host_memory(config: TrainConfig, train: Source, held_out: Source | None) -> Iterator[Finding]:
    """Compares what the data workers need with the host's memory and with /dev/shm."""
    pools = [_worker_pool(config, train, config.data.batch_size)]
    if held_out is not None:  # training's workers keep their batches during an evaluation
        size = config.data.evaluation_size
        pools.append(_worker_pool(config, held_out, size, math.ceil(len(held_out) / size)))
    uses = (f"{pool.workers} for {use}" for pool, use in zip(pools, ("training", "evaluations")))
    who = f"data workers ({', '.join(uses)})"
    needed = sum(p.batch_bytes * (p.shared_batches + p.private_batches) + p.process_bytes for p in pools)
    free = free_memory()
    found = f"{who} need about {format_bytes(needed)} of the {format_bytes(free)} available"
    remedy = "Choose fewer --data.workers or --data.worker-batches 1."
    yield Finding("fine" if needed < 0.8 * free else "failure", "host memory", found, remedy)
    yield from _check_shared_memory(pools)


def _worker_pool(config: TrainConfig, source: Source, batch_size: int, batches: int | None = None) -> _WorkerPool:
    data = config.data
    workers = worker_count(data, source, batches)
    # A worker holds the source twice, pickled and unpickled; class folders hold the names of all files.
    worker = _WORKER_BYTES + 2 * len(pickle.dumps(source))
    return _WorkerPool(
        workers,
        batch_bytes(data, batch_size) / jax.process_count(),
        shared_batches=max_shared_batches(workers, data.worker_batches),
        # A worker is making one batch and handing on another. Without workers a thread holds `worker_batches` that are
        # ready, one in the making, and one in use.
        private_batches=2 * workers or data.worker_batches + 2,
        process_bytes=workers * worker,
    )


def _check_shared_memory(pools: Sequence[_WorkerPool]) -> Iterator[Finding]:
    free, batches = _free_shared_memory(), sum(pool.shared_batches for pool in pools)
    if free is None or not batches:
        return
    needed = sum(pool.batch_bytes * pool.shared_batches for pool in pools)
    found = (
        f"the workers keep up to {batches:,} batches in /dev/shm, {format_bytes(needed)} in all, and "
        f"{format_bytes(free)} are free there"
    )
    yield Finding("fine" if needed < free else "failure", "shared memory", found, SHARED_MEMORY_ADVICE)


def _free_shared_memory() -> int | None:
    """Bytes that are free in /dev/shm; None on systems without it."""
    return shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None


def check_disk(config: TrainConfig, parts: RunParts, images: int) -> Finding:
    """Compares the size of the checkpoints with the free space."""
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(parts.abstract_state))
    kept_for_good = config.total_steps(images) // config.keep_every if config.keep_every else 0
    states = kept_for_good + config.keep_checkpoints + 1
    found = f"{states:,} states of {format_bytes(state)} in {config.checkpoints}"
    if not is_local(config.checkpoints):
        return Finding("fine", "disk", f"{found}, a bucket of unknown size")
    checkpoints = Path(config.checkpoints).absolute()
    folder = next(path for path in (checkpoints, *checkpoints.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    existing = len(saved_steps(checkpoints))
    needed = state * max(1, states - existing)  # at least one, because a state is deleted after the next is written
    found += f", {existing} of them there already" if existing else ""
    found += f", {format_bytes(free)} free"
    remedy = (
        "Free space, choose another --checkpoint-dir or --run-dir, or keep fewer: --keep-checkpoints, --keep-every."
    )
    return Finding("fine" if needed < 0.9 * free else "failure", "disk", found, remedy)


def check_device_memory(config: TrainConfig, parts: RunParts) -> Finding:
    """Compiles the training step as the run would, and compares its memory with the devices'.

    If the head learns from features that are computed once, the step that computes them counts too.
    """
    remedy = (
        "Choose --optimizer.accumulate 2 (or more), --remat, --dtype bfloat16, a larger --mesh.fsdp, or a smaller "
        "--data.batch-size."
    )
    try:
        needed = max(map(_memory, _lowered_steps(config, parts)))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):  # the TPU compiler's, which knows the memory of the chip
            raise
        return Finding("failure", "device memory", f"the step does not fit: {str(error).splitlines()[0]}", remedy)
    devices = parts.mesh.local_devices
    stats = devices[0].memory_stats() or {}
    # CPU devices share the host's memory.
    free = stats.get("bytes_limit") or free_memory() / len(devices)
    found = f"the compiled step needs {format_bytes(needed)} of the {format_bytes(free)} of each device"
    return Finding("fine" if needed < 0.95 * free else "failure", "device memory", found, remedy)


def _lowered_steps(config: TrainConfig, parts: RunParts) -> Iterator[jax.stages.Lowered]:
    """The training step, and the step that computes features if there is one."""
    data, network = config.data, parts.network.model.config
    array = functools.partial(jax.ShapeDtypeStruct, sharding=batch_sharding(parts.mesh))
    pixels = (data.image_size, data.image_size, data.num_channels)
    images = array((data.batch_size, *pixels), np.uint8)
    if parts.feature_step is not None:
        evaluated = array((data.evaluation_size, *pixels), np.uint8)
        yield parts.feature_step.lower(parts.abstract_state.variables(), evaluated)
        images = array((data.batch_size, network.hidden_sizes[-1]), np.float32)
    labels = array((data.batch_size,), np.int32)
    if data.has_target_vectors:
        labels = array((data.batch_size, network.num_labels), np.float32)
    yield parts.step.lower(parts.abstract_state, {"image": images, "label": labels})


def _memory(lowered: jax.stages.Lowered) -> int:
    """Bytes that a step needs on each device."""
    analysis: Any = lowered.compile().memory_analysis()
    return int(
        analysis.temp_size_in_bytes
        + analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes  # the new state replaces the old one
    )

"""`python -m train doctor RECIPE`: what would go wrong in a long run, found in a minute, each with its remedy.

Nothing is trained and nothing is written. The training step is compiled exactly as the run would compile it.
"""

import dataclasses
import math
import os
import pickle
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from poolformer_jax import process
from poolformer_jax.fields import first_few, is_local
from poolformer_jax.images.reading import ImageError, read_image
from poolformer_jax.network.fused import Kernels, StageShape, stages_without_kernels, verify_kernels
from poolformer_jax.network.kernel_stages import kernel_stages
from train.compute.distributed import initialize
from train.compute.sharding import batch_sharding
from train.config import TrainConfig
from train.data import (
    SHARED_MEMORY_ADVICE,
    ArraySource,
    FolderSource,
    Source,
    TrainingTransform,
    batch_bytes,
    image_of,
    max_shared_batches,
    open_source,
    worker_count,
)
from train.resume.checkpoints import CheckpointError, newest_run, saved_steps
from train.resume.same_run import kept_network, refuse_another_run, told_of_lost_steps
from train.setup import Assembly, assemble

Level = Literal["fine", "warning", "failure"]

# Images of each split that are read; the chance to miss 1 % bad ones is 0.99**256, about 8 %.
_SAMPLE = 256
_READERS = 16
# Below this many random reads a second, sixteen at a time, storage cannot feed even one accelerator.
_FEW_READS = 500.0
_FEW_STEPS = 100
_WORKER_BYTES = 150e6  # a worker process before it holds a batch: Python, NumPy, Pillow, Grain; with some room


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what was found, and unless it is fine, how to mend it."""

    level: Level
    subject: str
    found: str
    remedy: str = ""


def examine(config: TrainConfig) -> Iterator[Finding]:
    """Findings, in the order in which a run would meet them; ends early where nothing further can be looked at."""
    initialize(config.distributed)
    yield Finding("fine", "devices", f"{jax.device_count()} of kind {jax.devices()[0].device_kind}")
    sources: dict[str, Source] = {}
    for split in (config.data.train_split, config.data.evaluation_split):
        try:
            sources[split] = open_source(config.data, split)
        except (ValueError, OSError, ImportError) as error:
            yield Finding("failure", f"data, {split}", str(error), "Mend the source or the split's name.")
            continue
        yield from _look_at_split(config, split, sources[split])
    if config.data.train_split not in sources:
        return
    train = sources[config.data.train_split]
    yield from _look_at_classes(list(sources.values()))
    if len(train.class_names) < 2:
        return
    if config.data.evaluation_split in sources:
        yield from _look_for_classes_without_images(sources[config.data.evaluation_split])
    yield _look_at_steps(config, len(train))
    pools = _pools(config, train, sources.get(config.data.evaluation_split))
    yield _look_at_host_memory(pools)
    yield from _look_at_shared_memory(pools)
    unwritable = _look_for_what_cannot_be_written(config)
    run_folder = unwritable or _look_at_run_folder(config, train)
    yield run_folder
    try:
        kept = None if run_folder.level == "failure" else kept_network(config)
        parts = assemble(config, train.class_names, len(train), kept=kept)
    except ValueError as error:
        yield Finding("failure", "network, batch and devices", str(error), "Change the values that the message names.")
        return
    if unwritable is None:
        yield _look_at_disk(config, parts, len(train))
    if (finding := _check_kernels(config, parts)) is not None:
        yield finding
        if finding.level == "failure":  # a step with kernels that do not compile does not compile either
            return
    if (kernels := parts.network.model.kernels) is not None:
        yield from _check_batch_for_kernels(config, parts, kernels)
    yield _look_at_device_memory(config, parts)


def _look_at_split(config: TrainConfig, split: str, source: Source) -> Iterator[Finding]:
    subject = f"data, {split}"
    classes = f"{len(source.class_names):,} classes ({first_few(source.class_names)})"
    yield Finding("fine", subject, f"{len(source):,} images of {classes}{_passed_over(source)}")
    if split == config.data.train_split and len(source) < config.data.batch_size:
        yield Finding(
            "warning",
            subject,
            f"a batch of {config.data.batch_size} repeats images, because there are only {len(source)}",
            "Choose a smaller --data.batch-size.",
        )
    rows = np.random.default_rng(0).choice(len(source), min(_SAMPLE, len(source)), replace=False)
    start = time.perf_counter()
    with ThreadPoolExecutor(_READERS) as threads:
        examples = list(threads.map(lambda row: source[int(row)], rows))
    reads = len(rows) / (time.perf_counter() - start)
    if not isinstance(source, ArraySource):
        yield Finding(
            "fine" if reads >= _FEW_READS else "warning",
            f"storage, {split}",
            f"{reads:,.0f} random reads a second, {_READERS} at a time",
            "Pack the images for fast random access with python -m train prepare, or bring them closer.",
        )
    yield _look_at_images(config, subject, examples)


def _passed_over(source: Source) -> str:
    """What class folders hold besides images, the most frequent endings first."""
    if not isinstance(source, FolderSource) or not source.skipped:
        return ""
    counts = sorted(source.skipped.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{count:,} {suffix or 'without an ending'}" for suffix, count in counts[:5])
    return f"; {sum(source.skipped.values()):,} other files are passed over: {listed}"


def _look_at_images(config: TrainConfig, subject: str, examples: Sequence[Any]) -> Finding:
    transform, rng, bad = TrainingTransform(config.data), np.random.default_rng(0), []
    seconds = 0.0
    for example in examples:
        try:
            image = image_of(example)
            read_image(image, config.data.num_channels)  # to its end, which a crop need not reach
            start = time.perf_counter()
            transform(image, rng)
            seconds += time.perf_counter() - start
        except ImageError as error:
            bad.append(f"{example['id']}: {error}")
    milliseconds = 1e3 * seconds / len(examples)
    if bad:
        listed = "\n".join(bad[:10])
        return Finding(
            "failure" if config.data.on_bad_image == "error" or len(bad) == len(examples) else "warning",
            subject,
            f"{len(bad)} of {len(examples)} sampled images cannot be read:\n{listed}",
            "Replace them, or train without them: --data.on-bad-image skip.",
        )
    found = f"{len(examples)} sampled images are all readable; {milliseconds:.1f} ms each to decode and transform"
    return Finding("fine", subject, found)


def _look_at_classes(sources: Sequence[Source]) -> Iterator[Finding]:
    first = sources[0]
    if len(first.class_names) < 2:
        yield Finding(
            "failure",
            "classes",
            f"there is one only, {', '.join(first.class_names)}, and every answer would be right",
            "Name the folder that holds one folder per class.",
        )
    for other in sources[1:]:
        if other.class_names != first.class_names:
            missing = sorted(set(first.class_names) ^ set(other.class_names)) or ["their order"]
            yield Finding(
                "failure", "classes", f"the splits differ in {', '.join(missing[:10])}", "Give both the same classes."
            )


def _look_for_classes_without_images(held_out: Source) -> Iterator[Finding]:
    if not isinstance(held_out, ArraySource | FolderSource):  # others would have to read every image
        return
    seen = set(held_out.labels.tolist())
    if missing := [name for label, name in enumerate(held_out.class_names) if label not in seen]:
        yield Finding(
            "warning",
            "classes",
            f"{len(missing):,} of them have no image held out, and nothing will be known of them: {first_few(missing)}",
            "Add images; of a class with a single one none is held out.",
        )


def _look_at_steps(config: TrainConfig, images: int) -> Finding:
    per_epoch, total = config.steps_per_epoch(images), config.total_steps(images)
    warm_up = config.optimizer.warmup_epochs * per_epoch
    found = f"{per_epoch:,} steps an epoch, {total:,} in all, {warm_up:,} of them warm-up"
    if warm_up >= total:
        remedy = "Choose fewer --optimizer.warmup-epochs, or more --max-steps."
        return Finding("warning", "steps", f"{found}: the learning rate never reaches its peak", remedy)
    if total < _FEW_STEPS:
        remedy = "Choose a smaller --data.batch-size, or more --optimizer.epochs."
        return Finding("warning", "steps", f"{found}: few to learn anything in", remedy)
    return Finding("fine", "steps", found)


@dataclasses.dataclass(frozen=True)
class _Pool:
    """The workers of training or of evaluations, and the bytes of what they have at the same time."""

    workers: int
    batch: float
    """Bytes of one batch of this process."""
    shared: int
    """Batches in shared memory, at most."""
    private: int
    """Other batches, at most."""
    processes: float
    """Bytes of the processes themselves."""


def _pools(config: TrainConfig, train: Source, held_out: Source | None) -> list[_Pool]:
    data = config.data
    pools = [_pool_of(config, train, data.batch_size)]
    if held_out is not None:  # the training's workers keep their batches meanwhile
        size = data.evaluation_batch_size or data.batch_size
        pools.append(_pool_of(config, held_out, size, math.ceil(len(held_out) / size)))
    return pools


def _pool_of(config: TrainConfig, source: Source, batch_size: int, batches: int | None = None) -> _Pool:
    data = config.data
    workers = worker_count(data, source, batches)
    # A worker keeps the source as Grain sent it and as it unpacked it: class folders hold the names of all files.
    worker = _WORKER_BYTES + 2 * len(pickle.dumps(source))
    return _Pool(
        workers,
        batch_bytes(data, batch_size) / jax.process_count(),
        shared=max_shared_batches(workers, data.worker_batches),
        # A worker makes one and has one made; without workers a thread has some ready, makes one, and one is in use.
        private=2 * workers or data.worker_batches + 2,
        processes=workers * worker,
    )


def _look_at_host_memory(pools: Sequence[_Pool]) -> Finding:
    who = f"{pools[0].workers} data workers"
    if pools[1:]:
        who += f", and {pools[1].workers} more for evaluations,"
    needed = sum(pool.batch * (pool.shared + pool.private) + pool.processes for pool in pools)
    free = _available_memory()
    found = f"{who} need about {_format_bytes(needed)} of the {_format_bytes(free)} available"
    level: Level = "fine" if needed < 0.8 * free else "failure"
    return Finding(level, "host memory", found, "Choose fewer --data.workers or --data.worker-batches 1.")


def _look_at_shared_memory(pools: Sequence[_Pool]) -> Iterator[Finding]:
    free, batches = _free_shared_memory(), sum(pool.shared for pool in pools)
    if free is None or not batches:
        return
    needed = sum(pool.batch * pool.shared for pool in pools)
    found = (
        f"the workers keep up to {batches:,} batches in /dev/shm, {_format_bytes(needed)} in all, and "
        f"{_format_bytes(free)} are free there"
    )
    yield Finding("fine" if needed < free else "failure", "shared memory", found, SHARED_MEMORY_ADVICE)


def _free_shared_memory() -> int | None:
    """Bytes that are free in /dev/shm; None on systems without it."""
    return shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None


def _format_bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _available_memory() -> float:
    """Bytes that the host has to give, and the container, if there is one."""
    return min(_host_memory(), process.available_memory())


def _host_memory() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []:
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _look_for_what_cannot_be_written(config: TrainConfig) -> Finding | None:
    folders = [config.checkpoints]
    if jax.process_index() == 0:  # no other writes to the run's folder
        folders.insert(0, str(config.run_dir))
    reasons = dict.fromkeys(reason for folder in folders if (reason := _why_not_written(folder)))
    remedy = "Have it mended, or choose another --run-dir (and --checkpoint-dir, where it is given)."
    return Finding("failure", "run folder", "\n".join(reasons), remedy) if reasons else None


def _why_not_written(folder: str) -> str | None:
    """Why nothing can be written to a folder, which need not be there yet; None if it can, and of a bucket."""
    if not is_local(folder):
        return None
    place = Path(folder).absolute()
    # By functions of os: those of Path raise where nobody lets us look, and pass over a link to nowhere.
    there = next(path for path in (place, *place.parents) if os.path.lexists(path))
    if not os.path.isdir(there):  # noqa: PTH112
        return f"nothing can be written below {there}, which is no folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"nothing can be written to {there}: no permission, or a read-only file system"
    return None


def _look_at_disk(config: TrainConfig, parts: Assembly, images: int) -> Finding:
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(parts.abstract_state))
    kept_for_good = config.total_steps(images) // config.keep_every if config.keep_every else 0
    states = kept_for_good + config.keep_checkpoints + 1
    found = f"{states:,} states of {_format_bytes(state)} in {config.checkpoints}"
    if not is_local(config.checkpoints):
        return Finding("fine", "disk", f"{found}, a bucket of unknown size")
    checkpoints = Path(config.checkpoints).absolute()
    folder = next(path for path in (checkpoints, *checkpoints.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    there = len(saved_steps(checkpoints))
    needed = state * max(1, states - there)  # a run that goes on has written some, and writes one before it drops one
    found += f", {there} of them there already" if there else ""
    found += f", {_format_bytes(free)} free"
    remedy = (
        "Free space, choose another --checkpoint-dir or --run-dir, or keep fewer: --keep-checkpoints, --keep-every."
    )
    return Finding("fine" if needed < 0.9 * free else "failure", "disk", found, remedy)


def _look_at_run_folder(config: TrainConfig, source: Source) -> Finding:
    try:
        refuse_another_run(config, source)
        found = newest_run(config.checkpoints)
    except (ValueError, CheckpointError) as error:
        return Finding("failure", "run folder", str(error), "Choose a new --run-dir, or give what that run was given.")
    if found is None and (told := told_of_lost_steps(config)):
        return Finding("warning", "run folder", told, "Bring its states back, or choose a new --run-dir.")
    if found is None:
        return Finding("fine", "run folder", f"{config.run_dir} holds no run yet")
    return Finding("fine", "run folder", f"the run in {config.run_dir} would go on from step {found[0]}")


def _look_at_device_memory(config: TrainConfig, parts: Assembly) -> Finding:
    data, sharding = config.data, batch_sharding(parts.mesh)
    batch = {
        "image": jax.ShapeDtypeStruct(
            (data.batch_size, data.image_size, data.image_size, data.num_channels), np.uint8, sharding=sharding
        ),
        "label": jax.ShapeDtypeStruct((data.batch_size,), np.int32, sharding=sharding),
    }
    remedy = (
        "Choose --optimizer.accumulate 2 (or more), --remat, --dtype bfloat16, a larger --mesh.fsdp, or a smaller "
        "--data.batch-size."
    )
    try:
        analysis: Any = parts.step.lower(parts.abstract_state, batch).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:  # of the compiler for TPUs, which knows their memory
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = f"the step does not fit: {str(error).splitlines()[0]}"
        return Finding("failure", "device memory", found, remedy)
    # The new state takes the place of the old one.
    needed = (
        analysis.temp_size_in_bytes
        + analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
    )
    device = parts.mesh.local_devices[0]
    stats = device.memory_stats() or {}
    # CPU devices share the host's memory.
    free = stats.get("bytes_limit") or _available_memory() / len(parts.mesh.local_devices)
    found = f"the compiled step needs {_format_bytes(needed)} of the {_format_bytes(free)} of each device"
    return Finding("fine" if needed < 0.95 * free else "failure", "device memory", found, remedy)


def _check_kernels(config: TrainConfig, parts: Assembly) -> Finding | None:
    kernels, verification = parts.network.model.kernels, parts.kernel_verification
    if kernels is not None and verification is None:  # --kernels on
        verification = verify_kernels(kernels, _kernel_stages(config, parts), gradients=True)
    if verification is None:
        return None
    if verification.problem:
        found = verification.problem + ("; so XLA computes all blocks, more slowly" if kernels is None else "")
        remedy = "Train with --kernels off, and please report the device's name and the versions of jax and jaxlib."
        return Finding("warning" if kernels is None else "failure", "kernels", found, remedy)
    found = f"blocks with and without them differ by at most {verification.difference:.1%} ({verification.where})"
    return Finding("fine", "kernels", found)


def _check_batch_for_kernels(config: TrainConfig, parts: Assembly, kernels: Kernels) -> Iterator[Finding]:
    at_once = config.data.batch_size // config.optimizer.accumulate
    if stages := stages_without_kernels(kernels, _kernel_stages(config, parts), at_once):
        yield Finding(
            "warning",
            "kernels",
            f"every device gets {at_once // parts.mesh.devices.size} images at a time, a number that kernels do not "
            f"support in stages {', '.join(map(str, stages))}: XLA computes these, more slowly",
            f"Give every device a multiple of {kernels.batch_multiple} images at a time: by another --data.batch-size, "
            "fewer --optimizer.accumulate, or fewer devices.",
        )


def _kernel_stages(config: TrainConfig, parts: Assembly) -> list[StageShape]:
    return kernel_stages(parts.network.model.config, (config.data.image_size,) * 2, train=True)


def report(findings: Iterator[Finding], show: Callable[[str, str], None], width: int) -> int:
    """Shows every finding as it is made, and returns the exit code: 1 if a run would fail.

    Args:
        findings: from `examine`.
        show: prints a text in a style of rich.
        width: columns of the screen.
    """
    signs = {"fine": ("ok", "green"), "warning": ("warning", "yellow"), "failure": ("FAILS", "red")}
    failures = 0
    for finding in findings:
        sign, style = signs[finding.level]
        lines = f"{finding.subject}: {finding.found}".splitlines()
        if finding.level != "fine":
            lines.append(f"-> {finding.remedy}")
        indents = [f"{sign:<9}", *[" " * 9] * len(lines)]
        wrapped = (
            textwrap.fill(line, width, initial_indent=indent, subsequent_indent=" " * 11)
            for line, indent in zip(lines, indents)
        )
        show("\n".join(wrapped), style)
        failures += finding.level == "failure"
    show(f"\n{failures} of these would stop the run." if failures else "\nNothing here would stop the run.", "bold")
    return min(failures, 1)

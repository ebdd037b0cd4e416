"""`python -m train doctor RECIPE`: finds in a minute what would stop a long run, and says how to fix it.

It trains nothing and leaves nothing behind. The steps are compiled exactly as the run compiles them.
"""

import functools
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path

import jax
from rich.console import Console

from poolformer_jax.fields import is_local
from poolformer_jax.files import staging_folder
from poolformer_jax.network import kernel_stages
from poolformer_jax.network.fused import Kernels, StageShape, stages_without_kernels, verify_kernels
from train.commands.data_checks import check_classes, check_split
from train.commands.finding import Finding
from train.commands.resource_checks import check_device_memory, check_disk, check_host_memory
from train.compute import devices_of_slices, initialize
from train.config import TrainConfig
from train.data import Source, open_source
from train.resume import CheckpointError, Run, find_run
from train.setup import RunParts, find_class_weights, make_parts

_FEW_STEPS = 100
_ERRORS = (ValueError, OSError, ImportError)  # of data, weights and packages, which the user can fix


def examine(config: TrainConfig) -> Iterator[Finding]:
    """The findings, in the order in which a run would meet them; ends early if later checks need a failed one."""
    initialize(config.distributed)
    slices = len(devices_of_slices(jax.devices()))
    in_slices = f", in {slices} slices" if slices > 1 else ""
    yield Finding("fine", "devices", f"{jax.device_count()} of kind {jax.devices()[0].device_kind}{in_slices}")
    sources: dict[str, Source] = {}
    for split in (config.data.train_split, config.data.evaluation_split):
        try:
            sources[split] = open_source(config.data, split)
        except _ERRORS as error:
            yield Finding("failure", f"data, {split}", str(error), "Correct the source or the name of the split.")
            continue
        yield from check_split(config, split, sources[split])
    train, held_out = sources.get(config.data.train_split), sources.get(config.data.evaluation_split)
    if train is None:
        return
    yield from check_classes(config, list(sources.values()))
    if len(train.class_names) < 2 and not config.data.has_target_vectors:
        return
    yield _check_steps(config, len(train))
    yield from check_host_memory(config, train, held_out)
    unwritable = _check_writable(config)
    run_folder, run = (unwritable, None) if unwritable else _check_run_folder(config, train)
    yield run_folder
    try:
        parts = make_parts(
            config,
            train.class_names,
            len(train),
            checkpoint_network=run.network if run else None,
            class_weights=find_class_weights(config, train),
            use_features=True,
        )
    except _ERRORS as error:
        yield Finding("failure", "network, batch and devices", str(error), "Change the values that the message names.")
        return
    if unwritable is None:
        yield check_disk(config, parts, len(train))
    if (finding := _check_kernels(config, parts)) is not None:
        yield finding
        if finding.level == "failure":  # a step with kernels that do not compile does not compile either
            return
    if (kernels := parts.network.model.kernels) is not None:
        yield from _check_batch_for_kernels(config, parts, kernels)
    yield check_device_memory(config, parts)


def _check_steps(config: TrainConfig, images: int) -> Finding:
    per_epoch, total = config.steps_per_epoch(images), config.total_steps(images)
    warm_up = config.optimizer.warmup_epochs * per_epoch
    plural = "" if per_epoch == 1 else "s"
    found = f"{per_epoch:,} step{plural} an epoch, {total:,} in all, {warm_up:,} of them warm-up"
    if warm_up >= total:
        remedy = "Choose fewer --optimizer.warmup-epochs, or more --max-steps."
        return Finding("warning", "steps", f"{found}: the learning rate never reaches its peak", remedy)
    if total < _FEW_STEPS:
        remedy = "Choose a smaller --data.batch-size, or more --optimizer.epochs."
        return Finding("warning", "steps", f"{found}: too few to learn much", remedy)
    return Finding("fine", "steps", found)


def _check_writable(config: TrainConfig) -> Finding | None:
    """A failure if the run's folders cannot be written."""
    folders = [config.checkpoints]
    if jax.process_index() == 0:  # only this process writes to the run's folder
        folders.insert(0, str(config.run_dir))
    problems = dict.fromkeys(problem for folder in folders if (problem := _why_not_writable(folder)))
    remedy = "Repair the folder, or choose another --run-dir (and --checkpoint-dir, if you use it)."
    return Finding("failure", "run folder", "\n".join(problems), remedy) if problems else None


def _check_run_folder(config: TrainConfig, source: Source) -> tuple[Finding, Run | None]:
    """What the run's folders hold; None instead of the run if they cannot be used."""
    try:
        run = find_run(config, source)
    except (ValueError, CheckpointError) as error:
        remedy = "Choose a new --run-dir, or the values that the run was started with."
        return Finding("failure", "run folder", str(error), remedy), None
    if run.lost_steps is not None:
        remedy = "Restore its checkpoints, or choose a new --run-dir."
        return Finding("warning", "run folder", run.lost_steps_message(), remedy), run
    if run.newest_step is None:
        return Finding("fine", "run folder", f"{config.run_dir} holds no run yet"), run
    if run.newest_step >= config.total_steps(len(source)):
        return Finding("fine", "run folder", f"the run in {config.run_dir} is at its last step, {run.newest_step}"), run
    return Finding("fine", "run folder", f"the run in {config.run_dir} would resume from step {run.newest_step}"), run


def _why_not_writable(folder: str) -> str | None:
    """Why nothing can be written to a folder, which need not exist yet; None if it can, and for a bucket."""
    if not is_local(folder):
        return None
    absolute = Path(folder).absolute()
    # os.path, because methods of Path raise without permission, and follow broken links.
    existing = next(path for path in (absolute, *absolute.parents) if os.path.lexists(path))
    if not os.path.isdir(existing):  # noqa: PTH112
        return f"nothing can be written below {existing}, which is not a folder"
    try:  # permissions do not show quotas and names that are too long
        with staging_folder(existing) as stage:
            copy = stage / absolute.relative_to(existing)
            copy.mkdir(parents=True, exist_ok=True)
            (copy / "file").write_bytes(b"written")
    except OSError as error:
        return f"nothing can be written to {existing}: {error.strerror}"
    return None


def _check_kernels(config: TrainConfig, parts: RunParts) -> Finding | None:
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


def _check_batch_for_kernels(config: TrainConfig, parts: RunParts, kernels: Kernels) -> Iterator[Finding]:
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


def _kernel_stages(config: TrainConfig, parts: RunParts) -> list[StageShape]:
    return kernel_stages(parts.network.model.config, (config.data.image_size,) * 2, train=True)


def print_findings(findings: Iterator[Finding], console: Console) -> int:
    """Prints each finding as soon as it is found, and returns the exit code: 1 if a run would fail."""
    show = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    signs = {"fine": ("ok", "green"), "warning": ("warning", "yellow"), "failure": ("FAILS", "red")}
    failures = 0
    for finding in findings:
        sign, style = signs[finding.level]
        lines = f"{finding.subject}: {finding.found}".splitlines()
        if finding.level != "fine":
            lines.append(f"-> {finding.remedy}")
        indents = [f"{sign:<9}", *[" " * 9] * len(lines)]
        wrapped = (
            textwrap.fill(line, console.width, initial_indent=indent, subsequent_indent=" " * 11)
            for line, indent in zip(lines, indents)
        )
        show("\n".join(wrapped), style=style)
        failures += finding.level == "failure"
    show(
        f"\n{failures} of these would stop the run." if failures else "\nNothing here would stop the run.", style="bold"
    )
    return min(failures, 1)

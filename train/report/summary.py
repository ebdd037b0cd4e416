"""What a run prints at its start and at its end."""

import math
import shlex
import shutil
import sys
from pathlib import Path

import jax
from rich.console import Console

from train.compute import AnyEvaluation, Evaluation
from train.config import TrainConfig
from train.data import Source
from train.report.results import FOLDERS
from train.setup import RunParts


def print_header(config: TrainConfig, console: Console, parts: RunParts, source: Source, held_out: Source) -> None:
    """Prints, on process 0, what is trained on which images and devices, and where the results go."""
    if jax.process_index() > 0:
        return
    devices, sizes = parts.mesh.devices.flat, jax.tree.leaves(parts.abstract_state.params)
    parameters = sum(math.prod(array.shape) for array in sizes)
    size, batch_size = config.data.image_size, config.data.batch_size
    epochs = _count(config.optimizer.total_epochs, "epoch")
    steps = _count(config.total_steps(len(source)), "step")
    lines = [
        f"Devices   {len(devices)} x {devices[0].device_kind}, {config.dtype}",
        f"Images    {len(source):,} to train on, {len(held_out):,} held out, {len(source.class_names):,} classes",
        f"Network   {parameters:,} parameters, images of {size} x {size} pixels",
        f"Run       {config.run_dir}, {epochs}, {steps} of {batch_size:,} images",
    ]
    if parts.feature_step is not None:
        lines.append("Features  computed once: only the head is learnt, and nothing is augmented")
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def print_summary(config: TrainConfig, step: int, evaluations: dict[str, AnyEvaluation]) -> None:
    """Prints, on process 0, the accuracy, where the files are, and a command that classifies an image."""
    if jax.process_index() > 0:
        return
    if not evaluations:
        print(f"\nStopped after step {step}; its state is saved. The same command resumes it.")
        return
    run_dir, result = config.run_dir, evaluations["params"]
    headline = (
        f"Held-out accuracy {result.top1:.2%}" if isinstance(result, Evaluation) else f"Held out: {result.headline}"
    )
    print(f"\n{headline} ({result.examples:,} images), loss {result.loss:.3f}")
    if (ema := evaluations.get("ema")) is not None:
        text = f"{ema.top1:.2%}" if isinstance(ema, Evaluation) else ema.headline
        print(f"Running mean of the weights: {text}  ({run_dir / FOLDERS['ema']})")
    print(f"Model     {run_dir / FOLDERS['params']}\nCurves    {run_dir / 'curves.png'}")
    print(f"Report    {run_dir / 'report.html'}")
    if config.data.problem_type == "regression":
        return
    if images := sorted((run_dir / "examples").glob("*.png")):
        image, model = shlex.quote(str(images[0])), shlex.quote(str(run_dir / FOLDERS["params"]))
        print("\nNext, classify an image:")
        print(f"{shlex.quote(_python())} -m poolformer_jax predict {image} --weights {model} --top-k 5")


def _python() -> str:
    """The command for this interpreter, which may be in a virtual environment that is not activated."""
    this = Path(sys.executable)
    if (found := shutil.which("python")) is not None and Path(found) == this:
        return "python"
    return str(this.relative_to(Path.cwd())) if this.is_relative_to(Path.cwd()) else str(this)

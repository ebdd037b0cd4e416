"""The results of a finished run: model folders, evaluation.json, the report, and images to try the model on."""

import math
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from poolformer_jax import save_pretrained
from poolformer_jax.files import write_json
from poolformer_jax.hub import push_to_hub
from poolformer_jax.images import ImageError
from train.compute import AnyEvaluation, Evaluation, TrainState, to_host, weights_to_publish
from train.config import TrainConfig
from train.data import Example, Source, read_example
from train.report.analysis import class_scores, measure_calibration
from train.report.journal import finite_or_null
from train.report.page import write_report_files
from train.setup import RunParts

_FOLDERS = {"params": "model", "ema": "model-ema"}
# File names may have 255 bytes on most file systems, and 143 on encrypted ones.
_MOST_NAME_BYTES = 120


def write_results(
    config: TrainConfig,
    parts: RunParts,
    state: TrainState,
    held_out: Source,
    evaluations: dict[str, AnyEvaluation],
    finished: bool,
) -> None:
    """Writes the results into `config.run_dir`; collective: all processes call it, and process 0 writes.

    finished.json is written last of all, if the whole schedule is done or patience ended it (`finished`).
    """
    for weights, (step, tree) in weights_to_publish(state).items():
        variables = to_host(parts.mesh, tree)
        if jax.process_index() == 0:
            report = {"step": step, **evaluation_report(evaluations[weights], held_out.class_names)}
            _write_model(config.run_dir / _FOLDERS[weights], config, parts, variables, report)
            if weights == "params":
                model, model_report = variables, report
    if jax.process_index() == 0:
        result = evaluations["params"]
        write_report_files(config.run_dir, f"Run {config.run_dir}", result, model_report, held_out)
        write_examples(config.run_dir / "examples", held_out, config.example_images)
        if finished:
            if hasattr(os, "sync"):  # not on Windows
                os.sync()  # all results are on the disk before finished.json
            write_json(config.run_dir / "finished.json", {"step": int(state.step)})
        if config.push_to_hub is not None:
            _push_to_hub(config.push_to_hub, config, parts, model, model_report)


def _write_model(folder: Path, config: TrainConfig, parts: RunParts, variables: Any, report: Mapping[str, Any]) -> None:
    metrics = {name: value for name, value in report.items() if isinstance(value, int | float) and name != "step"}
    narrow = jax.tree.map(lambda array: array.astype(np.float32), variables)
    save_pretrained(
        folder,
        parts.network.model,
        narrow,
        layout="jax",
        image_processor=config.data.image_processor(),
        metrics=metrics,
    )
    write_json(folder / "evaluation.json", report)


def _push_to_hub(
    repository: str, config: TrainConfig, parts: RunParts, variables: Any, report: Mapping[str, Any]
) -> None:
    """Uploads the model with its card, evaluation.json and report.html."""

    def save(folder: Path) -> None:
        _write_model(folder, config, parts, variables, report)  # anew, because the card names its folder
        if (page := config.run_dir / "report.html").exists():
            shutil.copy(page, folder)

    print(f"Uploaded  {push_to_hub(repository, save)}")


def write_examples(folder: Path, source: Source, count: int) -> list[Path]:
    """Writes up to `count` images, spread evenly over a split, as PNGs named after their class.

    Unreadable images are left out: the evaluation has reported them. Other files in the folder stay.
    """
    paths = []
    for index in _spread(source, count):
        example = source[index]
        try:
            picture = read_example(example)
        except ImageError:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{_file_name(_label_text(source, example))}-{index}.png"
        path.unlink(missing_ok=True)  # a link there would lead to another file
        picture.save(path)
        paths.append(path)
    return paths


def _label_text(source: Source, example: Example) -> str:
    """The name of an image's class; with several targets, those that are not 0."""
    label = example["label"]
    if isinstance(label, int):
        return source.class_names[label]
    parts = [f"{name}={value:g}" for name, value in zip(source.class_names, label) if value]
    return ",".join(parts).replace("=1", "") or "none"


def _spread(source: Source, count: int) -> Sequence[int]:
    """Evenly spread positions, because a split may be sorted by class."""
    return [int(place) for place in np.linspace(0, len(source) - 1, min(count, len(source)))]


def _file_name(class_name: str) -> str:
    """The name's letters and digits, cut to leave room for a number and a suffix."""
    cleaned = "".join(c if c.isalnum() else "_" for c in class_name)
    return cleaned.encode()[:_MOST_NAME_BYTES].decode(errors="ignore")


def evaluation_report(evaluation: AnyEvaluation, class_names: Sequence[str]) -> dict[str, Any]:
    """The content of evaluation.json, JSON-ready: the figures, and those of every class.

    With predictions, calibration is among them, and precision, recall and F1 of every class.
    """
    if not isinstance(evaluation, Evaluation):
        rows = [{"class": name, **row} for name, row in zip(class_names, evaluation.targets)]  # or the numbers
        return {**finite_or_null(evaluation.summary()), "classes": rows}
    classes: list[dict[str, Any]] = [
        {"class": name, "examples": int(count), "top1": int(right) / int(count) if count else None}
        for name, count, right in zip(class_names, evaluation.class_examples, evaluation.class_correct)
    ]
    figures = evaluation.summary()
    if evaluation.predictions is not None:
        classes = [row | scores for row, scores in zip(classes, class_scores(evaluation.predictions))]
        calibration = measure_calibration(evaluation.predictions)
        figures |= {
            "calibration_error": calibration.error,
            "calibration_error_with_temperature": calibration.error_after,
            "temperature": calibration.temperature,
        }
    return {**finite_or_null(figures), "classes": classes}


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
        print(f"Running mean of the weights: {text}  ({run_dir / _FOLDERS['ema']})")
    print(f"Model     {run_dir / _FOLDERS['params']}\nCurves    {run_dir / 'curves.png'}")
    print(f"Report    {run_dir / 'report.html'}")
    if config.data.problem_type == "regression":
        return
    if images := sorted((run_dir / "examples").glob("*.png")):
        image, model = shlex.quote(str(images[0])), shlex.quote(str(run_dir / _FOLDERS["params"]))
        print("\nNext, classify an image:")
        print(f"{shlex.quote(_python())} -m poolformer_jax predict {image} --weights {model} --top-k 5")


def _python() -> str:
    """The command for this interpreter, which may be in a virtual environment that is not activated."""
    this = Path(sys.executable)
    if (found := shutil.which("python")) is not None and Path(found) == this:
        return "python"
    return str(this.relative_to(Path.cwd())) if this.is_relative_to(Path.cwd()) else str(this)

"""The results of a finished run: model folders, evaluation.json, the report, and images to try the model on."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from poolformer_jax import save_pretrained
from poolformer_jax.errors import InputError, MissingDependencyError
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

# Of the model, by the kind of its weights.
FOLDERS = {"params": "model", "ema": "model-ema"}
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
            _write_model(config.run_dir / FOLDERS[weights], config, parts, variables, report)
            if weights == "params":
                model, model_report = variables, report
    if jax.process_index() == 0:
        result = evaluations["params"]
        write_report_files(
            config.run_dir, f"Run {config.run_dir} on {config.data.source}", result, model_report, held_out
        )
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

    try:
        address = push_to_hub(repository, save)
    except MissingDependencyError:
        raise
    except Exception as error:  # each part of huggingface_hub has exceptions of its own
        raise InputError(
            f"The model is in {config.run_dir / FOLDERS['params']}, but its upload to {repository} failed: {error}\n"
            "Check the network and `hf auth login`, then repeat the command: it uploads without training again."
        ) from error
    print(f"Uploaded  {address}")


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

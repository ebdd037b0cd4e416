"""`python -m train evaluate SOURCE --data ...`: the accuracy of any model on a whole split.

On ImageNet this command reproduces the paper's table from the published weights.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from poolformer_jax.files import write_json
from poolformer_jax.messages import MAX_MESSAGE, printable
from train.commands.evaluate_config import EvaluateConfig
from train.commands.imagenet_sets import (
    corruption_folders,
    mean_corruption_error,
    read_real_labels,
    score_real_labels,
    write_results_row,
)
from train.commands.scoring import Scored, Scorer
from train.compute import AnyEvaluation, Evaluation, initialize
from train.data import describe_skipped, describe_split, describe_unused_test
from train.folders import refuse_run_folder
from train.report import evaluation_report, write_report_files

# Classes in the printed table; evaluation.json has all of them.
_MOST_ROWS = 20


def run_evaluation(config: EvaluateConfig, console: Console) -> AnyEvaluation:
    """Evaluates, prints the result, and writes it to `config.output` and `config.results_file` if given.

    Of ImageNet-C the evaluation of the last corruption is returned.

    Raises:
        ValueError: if model and data do not fit each other, or the processes differ.
    """
    initialize(config.distributed)
    refuse_run_folder(config.source)
    scorer = Scorer(config, console)
    kind, _, path = config.data.partition(":")
    if kind == "imagenet-c":
        return _evaluate_corruptions(config, scorer, Path(path).expanduser())
    real = None if config.real_labels is None else read_real_labels(config.real_labels)
    scored = scorer.score(config.data, keep_logits=config.output is not None or real is not None)
    if jax.process_index() == 0:
        _report(config, scored)
        figures = _report_real_labels(scored, real)
        if config.results_file is not None and isinstance(scored.evaluation, Evaluation):
            top1, top5 = figures or (scored.evaluation.top1, scored.evaluation.top5)
            write_results_row(config.results_file, config.source, top1, top5, scorer.parameters, scorer.processor)
    return scored.evaluation


def _evaluate_corruptions(config: EvaluateConfig, scorer: Scorer, root: Path) -> AnyEvaluation:
    """Evaluates on every corruption and severity of ImageNet-C, and reports the mean corruption error."""
    errors: dict[str, list[float]] = {}
    for (corruption, _), folder in corruption_folders(root).items():
        evaluation = scorer.score(f"folder:{folder}", keep_logits=False).evaluation
        assert isinstance(evaluation, Evaluation)
        errors.setdefault(corruption, []).append(1 - evaluation.top1)
    error, relative = mean_corruption_error(errors)
    if jax.process_index() == 0:
        table = Table(*("corruption", "top-1 error", "CE"))
        for name, values in errors.items():
            table.add_row(name, f"{np.mean(values):.1%}", f"{relative[name]:.1%}")
        print(f"{printable(config.source)} on {printable(config.data)}: mCE {error:.2%}")
        Console().print(table)
        if config.output is not None:
            figures = {"mce": error, "corruption_errors": relative, "top1_errors": errors}
            write_json(config.output / "imagenet-c.json", {"model": config.source, "data": config.data, **figures})
    return evaluation


def _report_real_labels(scored: Scored, real: Sequence[Sequence[int]] | None) -> tuple[float, float] | None:
    """Prints the accuracy by ReaL labels, and returns its top-1 and top-5; None without."""
    if real is None:
        return None
    assert isinstance(scored.evaluation, Evaluation) and scored.evaluation.predictions is not None
    examples, top1, top5 = score_real_labels(scored.evaluation.predictions, scored.source, real)
    print(f"ReaL labels: top-1 {top1:.2%}  top-5 {top5:.2%}  ({examples:,} images that have them)")
    return top1, top5


def _print_targets(report: Mapping[str, Any]) -> None:
    """Prints the figures of every class or number."""
    figures = [name for name in report["classes"][0] if name != "class"]
    table = Table("number" if "mse" in report else "class", *figures)
    for row in report["classes"][:_MOST_ROWS]:
        table.add_row(
            Text(printable(row["class"])), *(f"{row[name]:.4g}" if row[name] is not None else "" for name in figures)
        )
    Console().print(table)


def _report(config: EvaluateConfig, scored: Scored) -> None:
    evaluation, data, source, class_names = scored.evaluation, scored.data, scored.source, scored.class_names
    # Not from `batches.bad_images`, which has only those of this process.
    left_out = len(source) - evaluation.examples
    split, part = data.evaluation_split, describe_split(data)
    print(printable(f"{config.source} on {config.data}, {part}: {evaluation.examples:,} images", MAX_MESSAGE))
    print(f"{evaluation.headline}   loss {evaluation.loss:.4f}")
    if isinstance(evaluation, Evaluation) and (there := np.count_nonzero(evaluation.class_examples)) < len(class_names):
        others = "an answer of another class counts as wrong" if config.classes == "all" else "answers are among these"
        print(f"{there} of {len(class_names)} classes have images here; {others}.")
    for note in filter(None, (describe_skipped(source), config.split is None and describe_unused_test(data))):
        print(note)
    if left_out:
        print(f"{left_out:,} images could not be read and are not in the score.")
    report = evaluation_report(evaluation, class_names)
    if isinstance(evaluation, Evaluation):
        _print_worst_classes(report)
    else:
        _print_targets(report)
    if config.output is not None:
        subject = {"model": config.source, "data": config.data, "split": split, "scored": part}
        write_json(config.output / "evaluation.json", {**subject, "left_out": left_out, **report})
        write_report_files(config.output, f"{config.source} on {config.data}", evaluation, report, source)
        print(printable(f"Written to {config.output}", MAX_MESSAGE))


def _print_worst_classes(report: Mapping[str, Any]) -> None:
    rows = sorted((row for row in report["classes"] if row["examples"]), key=lambda row: row["top1"])
    table = Table(title=f"The {_MOST_ROWS} worst classes" if len(rows) > _MOST_ROWS else None)
    for heading in ("class", "images", "top-1"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for row in rows[:_MOST_ROWS]:
        table.add_row(Text(printable(row["class"])), f"{row['examples']:,}", f"{row['top1']:.1%}")
    Console().print(table)

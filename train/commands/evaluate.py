"""`python -m train evaluate SOURCE --data ...`: the accuracy of any model on a whole split.

On ImageNet this command reproduces the paper's table from the published weights.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from poolformer_jax import PoolFormerConfig, PoolFormerImageProcessor
from poolformer_jax.errors import InputError
from poolformer_jax.export import FORMATS, ExportedFile, open_exported
from poolformer_jax.fields import check_rules, is_local
from poolformer_jax.files import write_json
from poolformer_jax.images import unit_mean_and_std
from poolformer_jax.messages import MAX_MESSAGE, printable
from poolformer_jax.network import count_parameters
from poolformer_jax.weights import build_model, open_model
from train.commands.exported_model import LogitsAsPixels, logits_of_batches
from train.commands.imagenet_sets import (
    corruption_folders,
    mean_corruption_error,
    read_real_labels,
    score_real_labels,
    write_results_row,
)
from train.compute import (
    AnyEvaluation,
    Classifier,
    Evaluation,
    Normalize,
    evaluate,
    from_process_0,
    initialize,
    make_evaluation_step,
    make_mesh,
    process_part,
    refuse_different_processes,
    replicated,
)
from train.config import DistributedConfig, MeshConfig, as_json
from train.data import (
    ALL_IMAGES,
    DataConfig,
    DeviceAugmentation,
    Source,
    check_same_classes,
    describe_skipped,
    describe_split,
    evaluation_batches,
    is_pool,
    match_labels,
    normalize_batch,
    open_source,
)
from train.folders import expand_home, refuse_run_folder
from train.report import evaluation_report, write_report_files
from train.resume import FREE_TO_DIFFER, describe_changes, network_to_dict

# Classes in the printed table; evaluation.json has all of them.
_MOST_ROWS = 20


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """A model and the split to evaluate it on."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """A model on the Hub (sail/poolformer_s12), a model folder (runs/digits/model), a file of weights, or an exported
    file (s12.onnx, s12.xml, s12.stablehlo)."""
    data: str
    """folder:PATH (class folders), labels:FILE, parquet:PATH, tfds:NAME or tfds:PATH, digits, synthetic, or
    imagenet-c:PATH (every corruption and severity of ImageNet-C)."""
    split: str | None = None
    """The split; TFDS's slices work for tfds: "validation[:5000]". Default: validation, or all of undivided folders."""
    data_dir: Path | None = None
    """Where TFDS keeps its data sets. Default: TFDS's own."""
    image_column: str | None = None
    """Column of the images in labels: and parquet: sources. Default: as in training."""
    label_column: str = "label"
    """Column of the classes in them."""
    held_out: float | None = None
    """Share of every class that makes a missing --split validation. Default: training's, digits 0.2 and others 0.1."""
    class_map: Path | None = None
    """File with the model's label of each class of the data: a class per line, in order, or JSON {name: label}."""
    use_ema: bool = False
    """Evaluate the running mean of the weights, where a checkpoint of PyTorch has one."""
    variant: str | None = None
    """The published network, if the arrays do not determine it: poolformer_ln_s12 looks like s12."""
    ignore: tuple[str, ...] = ()
    """Names of arrays in the weights file to leave out, as patterns: 'criterion.*'."""
    revision: str | None = None
    """Branch, tag or commit of a model on the Hub."""
    cache_dir: Path | None = None
    """The Hub's cache. Default: huggingface_hub's, HF_HOME."""
    token: str | None = None
    """For private models. Default: the one stored by hf auth login."""
    local_files_only: bool = False
    """Use the cache without asking the Hub."""
    batch_size: int = 256
    """Images in a step, over all processes; rounded up to a multiple of the devices."""
    workers: int | None = None
    """Worker processes on every host that decode images. Default: one for every core but one."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Stop at an image that cannot be read and name it, or leave it out of the score and say so."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the activations."""
    flip: bool = False
    """Average the logits of every image and of its mirror image."""
    classes: Literal["all", "data"] = "all"
    """Choose among all classes of the model, or only those of the data, as is usual for ImageNet-A and ImageNet-R."""
    real_labels: Path | None = None
    """real.json with the ReaL labels of ImageNet's validation images: score by them too."""
    results_file: Path | None = None
    """CSV file to add a row to, with the columns of timm's validate.py; by ReaL labels if they are given."""
    output: Path | None = None
    """Folder for report.html, evaluation.json, predictions.csv, and the pictures that report.html shows."""
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    """How the processes of several hosts find each other."""

    def __post_init__(self) -> None:
        expand_home(self, "output", "results_file", "cache_dir")
        rules = [
            (
                "results_file",
                self.results_file is None or not self.data.startswith("imagenet-c:"),
                "None with imagenet-c: its figure has no column there; see --output",
            ),
            ("batch_size", self.batch_size >= 1, "a positive number of images"),
            ("output", is_local(self.output), "a folder of this machine, or of a bucket that is mounted"),
        ]
        check_rules(self, rules)


def run_evaluation(config: EvaluateConfig, console: Console) -> AnyEvaluation:
    """Evaluates, prints the result, and writes it to `config.output` and `config.results_file` if given.

    Of ImageNet-C the evaluation of the last corruption is returned.

    Raises:
        ValueError: if model and data do not fit each other, or the processes differ.
    """
    initialize(config.distributed)
    refuse_run_folder(config.source)
    scorer = _Scorer(config, console)
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


@dataclasses.dataclass(frozen=True)
class _Scored:
    """A model's evaluation on a split, and the names of its classes."""

    evaluation: AnyEvaluation
    data: DataConfig
    source: Source
    class_names: tuple[str, ...]


class _Scorer:
    """A model on the devices, to score on one split or several."""

    def __init__(self, config: EvaluateConfig, console: Console) -> None:
        self._config, self._console, self._mesh = config, console, make_mesh(MeshConfig())
        self._exported: ExportedFile | None = None
        self._model: Classifier
        if Path(config.source).suffix.lower() in FORMATS:
            self._exported = exported = open_exported(Path(config.source).expanduser())
            self._model, variables = LogitsAsPixels(exported.config), dict[str, Any]()
            self.processor, self._labels = exported.image_processor, exported.labels
        else:
            hub = {name: getattr(config, name) for name in ("revision", "cache_dir", "token", "local_files_only")}
            opened = open_model(
                config.source, variant=config.variant, ignore=config.ignore, use_ema=config.use_ema, **hub
            )
            self._model, variables = build_model(opened, dtype=jnp.dtype(config.dtype))
            self.processor, self._labels = opened.image_processor, opened.labels
        self.parameters = count_parameters(self._model.config)
        # As NumPy arrays, because arrays on this process's devices cannot become arrays of all processes.
        self._variables = jax.device_put(jax.tree.map(np.asarray, variables), replicated(self._mesh))
        self._step = functools.cache(self._make_step)  # compiled once for all splits with the same classes

    def _make_step(self, mean: Sequence[float], std: Sequence[float], kept_classes: tuple[int, ...] | None) -> Any:
        data = DataConfig(image_mean=tuple(mean), image_std=tuple(std))
        normalize: Normalize = functools.partial(normalize_batch, config=data, dtype=jnp.dtype(self._config.dtype))
        flip = self._config.flip
        if self._exported is not None:  # `logits_of_batches` has normalised and flipped
            normalize, flip = lambda logits: logits, False
        return make_evaluation_step(self._model, normalize, self._mesh, replicated(self._mesh), flip, kept_classes)

    def score(self, name: str, keep_logits: bool) -> _Scored:
        """The model's evaluation on the data `name`, in `EvaluateConfig.data`'s notation."""
        config = self._config
        problem = self._model.config.problem_type
        data = _data_config(config, name, self.processor, self._mesh.devices.size, problem)
        source = open_source(data, data.evaluation_split)
        _compare_processes(config, data, source, self._model.config, self.processor)
        class_names = source.class_names
        has_map = config.class_map is not None or data.has_target_vectors
        model_labels = None if has_map else match_labels(self._model.config, class_names)
        if model_labels is None:
            remedy = "fine-tune the model to these classes with python -m train finetune"
            check_same_classes(
                config.source, self._model.config, name, class_names, remedy, config.class_map is not None
            )
        else:
            class_names = tuple(name for _, name in sorted(self._labels.items()))
        kept = None
        if config.classes == "data":
            kept = tuple(np.unique(source.labels if model_labels is None else model_labels).tolist())
        step = self._step(data.image_mean, data.image_std, kept)
        with evaluation_batches(data, source, image_processor=self.processor, **process_part(self._mesh)) as batches:
            count = -(-len(source) // data.batch_size)
            hidden = jax.process_index() > 0
            split: Iterable[Any] = track(batches, "Evaluating", total=count, console=self._console, disable=hidden)
            if model_labels is not None:  # the data has some of the model's classes
                split = ({**batch, "label": model_labels[batch["label"]]} for batch in split)
            if self._exported is not None:
                split = logits_of_batches(self._exported, split, config.flip)
            weights = {"params": self._variables}
            evaluation = evaluate(step, weights, split, self._mesh, keep_logits, data.problem_type)["params"]
        return _Scored(evaluation, data, source, class_names)


def _evaluate_corruptions(config: EvaluateConfig, scorer: _Scorer, root: Path) -> AnyEvaluation:
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


def _report_real_labels(scored: _Scored, real: Sequence[Sequence[int]] | None) -> tuple[float, float] | None:
    """Prints the accuracy by ReaL labels, and returns its top-1 and top-5; None without."""
    if real is None:
        return None
    assert isinstance(scored.evaluation, Evaluation) and scored.evaluation.predictions is not None
    examples, top1, top5 = score_real_labels(scored.evaluation.predictions, scored.source, real)
    print(f"ReaL labels: top-1 {top1:.2%}  top-5 {top5:.2%}  ({examples:,} images that have them)")
    return top1, top5


def _compare_processes(
    config: EvaluateConfig,
    data: DataConfig,
    source: Source,
    network: PoolFormerConfig,
    processor: PoolFormerImageProcessor,
) -> None:
    """Raises ValueError on every process if one has another command, model or data than process 0.

    Otherwise they would count wrongly, or wait for each other forever.
    """
    if jax.process_count() == 1:
        return
    mine: dict[str, Any] = {
        "recipe": as_json(
            {
                "dtype": config.dtype,
                "use_ema": config.use_ema,
                "flip": config.flip,
                "classes": config.classes,
                "data": dataclasses.asdict(data),
                "network": network_to_dict(network),
                "preprocessing": processor.to_dict(),
            }
        ),
        "classes": list(source.class_names),
        "images": len(source),
        "examples": source.digest,
    }
    changed = describe_changes(from_process_0(mine), mine, FREE_TO_DIFFER, "images")
    refuse_different_processes(changed, "the same command, the same model and the same data")


def _split(config: EvaluateConfig, name: str) -> str:
    """The split to score: class folders without train/ and validation/ are scored whole."""
    kind, _, path = name.partition(":")
    if config.split is not None:
        return config.split
    return ALL_IMAGES if kind == "folder" and config.held_out is None and is_pool(path) else "validation"


def _data_config(
    config: EvaluateConfig, name: str, processor: PoolFormerImageProcessor, devices: int, problem: Any
) -> DataConfig:
    """The data, normalised as by the model's preprocessing, which resizes and crops the images.

    Raises:
        InputError: if the preprocessing makes images of different sizes.
    """
    if processor.output_size is None:
        raise InputError(
            f"The preprocessing of {config.source} makes images of different sizes, which cannot be in one batch. "
            "Expected do_center_crop=True, or a size of height and width without crop_pct."
        )
    mean, std = unit_mean_and_std(processor)
    default_share = 0.2 if name == "digits" else 0.1
    return DataConfig(
        source=name,
        data_dir=config.data_dir,
        image_column=config.image_column,
        label_column=config.label_column,
        problem_type=problem or "single_label_classification",
        mix=DeviceAugmentation(cutmix=0.0, label_smoothing=0.0),  # unused; regression refuses the defaults
        class_map=config.class_map,
        evaluation_split=_split(config, name),
        held_out=default_share if config.held_out is None else config.held_out,
        image_size=max(processor.output_size),
        image_mean=tuple(mean),
        image_std=tuple(std),
        batch_size=-(-config.batch_size // devices) * devices,
        workers=config.workers,
        on_bad_image=config.on_bad_image,
    )


def _print_targets(report: Mapping[str, Any]) -> None:
    """Prints the figures of every class or number."""
    figures = [name for name in report["classes"][0] if name != "class"]
    table = Table("number" if "mse" in report else "class", *figures)
    for row in report["classes"][:_MOST_ROWS]:
        table.add_row(
            Text(printable(row["class"])), *(f"{row[name]:.4g}" if row[name] is not None else "" for name in figures)
        )
    Console().print(table)


def _report(config: EvaluateConfig, scored: _Scored) -> None:
    evaluation, data, source, class_names = scored.evaluation, scored.data, scored.source, scored.class_names
    # Not from `batches.bad_images`, which has only those of this process.
    left_out = len(source) - evaluation.examples
    kind, _, path = config.data.partition(":")
    split = data.evaluation_split
    part = describe_split(path, split, data.held_out) if kind == "folder" else f"split {split}"
    print(printable(f"{config.source} on {config.data}, {part}: {evaluation.examples:,} images", MAX_MESSAGE))
    print(f"{evaluation.headline}   loss {evaluation.loss:.4f}")
    if isinstance(evaluation, Evaluation) and (there := np.count_nonzero(evaluation.class_examples)) < len(class_names):
        others = "an answer of another class counts as wrong" if config.classes == "all" else "others are no answers"
        print(f"{there} of {len(class_names)} classes have images here; {others}.")
    if skipped := describe_skipped(source):
        print(skipped)
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

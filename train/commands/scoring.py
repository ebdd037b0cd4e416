"""A model from any source, scored on any data: opens both, matches their classes, and counts."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from poolformer_jax import PoolFormerConfig, PoolFormerImageProcessor
from poolformer_jax.errors import InputError
from poolformer_jax.export import ExportedFile, open_exported
from poolformer_jax.inference import check_finite
from poolformer_jax.network import count_parameters
from poolformer_jax.weights import build_model
from train.commands.evaluate_config import EvaluateConfig
from train.commands.exported_model import LogitsAsPixels, logits_of_batches
from train.compute import (
    AnyEvaluation,
    Classifier,
    Normalize,
    evaluate,
    from_process_0,
    make_evaluation_step,
    make_mesh,
    process_part,
    refuse_different_processes,
    replicated,
)
from train.config import MeshConfig
from train.data import (
    ALL_IMAGES,
    DataConfig,
    DeviceAugmentation,
    Source,
    TimmImageProcessor,
    check_same_classes,
    evaluation_batches,
    find_splits,
    match_labels,
    normalize_batch,
    open_source,
)
from train.json_values import as_json
from train.resume import FREE_TO_DIFFER, describe_changes, network_to_dict


@dataclasses.dataclass(frozen=True)
class Scored:
    """A model's evaluation on a split, and the names of its classes."""

    evaluation: AnyEvaluation
    data: DataConfig
    source: Source
    class_names: tuple[str, ...]


class Scorer:
    """A model on the devices, to score on one split or several."""

    def __init__(self, config: EvaluateConfig, console: Console) -> None:
        self._config, self._console, self._mesh = config, console, make_mesh(MeshConfig())
        self._exported: ExportedFile | None = None
        self._model: Classifier
        if config.is_exported:
            self._exported = exported = open_exported(Path(config.source).expanduser())
            self._model, variables = LogitsAsPixels(exported.config), dict[str, Any]()
            self.processor, self._labels = exported.image_processor, exported.labels
        else:
            opened = config.open_model()
            self._model, variables = build_model(opened, dtype=jnp.dtype(config.dtype))
            self.processor, self._labels = opened.image_processor, opened.labels
        if self._model.config.problem_type in ("multi_label_classification", "regression"):
            _check_options_of_classes(config)
        if config.preprocessing == "timm":
            self.processor = TimmImageProcessor(**vars(self.processor))
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

    def score(self, name: str, keep_logits: bool) -> Scored:
        """The model's evaluation on the data `name`, in `EvaluateConfig.data`'s notation.

        Raises InputError if the loss is not finite.
        """
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
        check_finite(evaluation.loss)
        return Scored(evaluation, data, source, class_names)


def _check_options_of_classes(config: EvaluateConfig) -> None:
    """Raises InputError for options that need a network with one class per image."""
    chosen = {"results_file": config.results_file, "real_labels": config.real_labels}
    given = [name for name, value in chosen.items() if value is not None]
    if given := given + ["classes"] * (config.classes != "all"):
        raise InputError(
            f"{', '.join(given)}: {config.source} does not choose one class for an image. Expected the default."
        )


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
                "pixels": config.preprocessing,
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


def _data_config(
    config: EvaluateConfig, name: str, processor: PoolFormerImageProcessor, devices: int, problem: Any
) -> DataConfig:
    """The data, normalised as by the model's preprocessing, which resizes and crops the images."""
    data = config.data_config(
        processor,
        name,
        problem_type=problem or "single_label_classification",
        mix=DeviceAugmentation(cutmix=0.0, label_smoothing=0.0),  # unused; regression refuses the defaults
        evaluation_split=config.split or "validation",
        batch_size=-(-config.batch_size // devices) * devices,
        workers=config.workers,
        on_bad_image=config.on_bad_image,
    )
    if config.split is None and config.held_out is None and find_splits(data) == ():
        return dataclasses.replace(data, evaluation_split=ALL_IMAGES)  # data that is not divided is scored whole
    return data

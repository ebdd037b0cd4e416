"""The content of report.json: everything about a conversion and its source."""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import poolformer_jax
from convert.conversion import ArrayMapping, saved_image_processor
from poolformer_jax.errors import InputError
from poolformer_jax.hub import CONFIG
from poolformer_jax.images import PREPROCESSOR_CONFIG
from poolformer_jax.network import WeightsMismatch
from poolformer_jax.weights import LAYOUTS, MODEL_CARD, WEIGHTS, ModelFiles, OpenedModel, WeightsFile

FILE = "report.json"


def describe_source(source: OpenedModel) -> dict[str, Any]:
    """Describes a model's files and its network."""
    config, processor = source.config, saved_image_processor(source)
    return {
        **describe_file(source.weights),
        "layout": source.plan.layout,
        "variant": source.plan.variant,
        "head_order": config.head_order,
        "num_labels": config.num_labels,
        "labels_named": config.id2label is not None,
        "parameters": sum(math.prod(leaf.shape) for leaf in source.plan.leaves),
        "config": config.to_dict(),
        "config_file": str(source.files.config) if source.files.config else None,
        "preprocessing": processor.to_dict() if processor else None,
    }


def describe_file(weights: WeightsFile) -> dict[str, Any]:
    """Describes a weights file, of any network."""
    return {
        "container": weights.container,
        "wrapping": weights.wrapping,
        "has_ema": weights.has_ema,
        "beside_the_weights": list(weights.others),
        "metadata": dict(weights.metadata),
        "arrays": len(weights.tensors),
        "bytes": weights.nbytes,
        "dtypes": dict(Counter(tensor.dtype.name for tensor in weights.tensors.values())),
    }


def describe_files(weights: WeightsFile) -> list[dict[str, Any]]:
    """Size and hash of every file that was read."""
    return [{"path": str(path), "bytes": path.stat().st_size, "sha256": _sha256(path)} for path in weights.files]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_conversion(
    source: OpenedModel, files: list[dict[str, Any]], destination: Path, layout: str, mappings: list[ArrayMapping]
) -> dict[str, Any]:
    """The report of a successful conversion."""
    return {
        "program": f"poolformer-jax {poolformer_jax.__version__}",
        "source": {"given": source.files.source, "files": files, **describe_source(source)},
        "destination": {
            "folder": str(destination),
            "layout": layout,
            **{"head_order": source.config.head_order, **LAYOUTS[layout].fixed_fields(source.config)},
            "dtype": "float32",
        },
        "arrays": [
            {
                "source": one.given_name,
                "destination": one.target.name,
                "parameter": one.target.path,
                "source_shape": list(one.source.stored_shape),
                "destination_shape": list(one.target.stored_shape),
                "transform": one.transform,
                "dtype": one.dtype,
                "rounded": one.dtype == "float64",
            }
            for one in mappings
        ],
        **mismatches(None),
    }


def mismatches(error: WeightsMismatch | None) -> dict[str, Any]:
    """The names that did not match; empty lists without an error."""
    missing: Mapping[str, Any] = error.missing if error else {}
    unexpected: Mapping[str, Any] = error.unexpected if error else {}
    misshaped: Mapping[str, Any] = error.misshaped if error else {}
    return {
        "missing": [{"name": name, "shape": list(shape)} for name, shape in missing.items()],
        "unexpected": [{"name": name, "shape": list(shape)} for name, shape in unexpected.items()],
        "misshaped": [
            {"name": name, "shape": list(given), "expected": list(expected)}
            for name, (given, expected) in misshaped.items()
        ],
    }


def check_path(path: Path, destination: Path, files: ModelFiles, weights: WeightsFile) -> None:
    """Raises InputError if the report would overwrite a file of the model in `destination`, or of the source."""
    names = (CONFIG, PREPROCESSOR_CONFIG, MODEL_CARD, *WEIGHTS)
    if path.resolve() in {destination.resolve(), *((destination / name).resolve() for name in names)}:
        raise InputError(f"--report {path} would overwrite the model. Expected another name, such as {FILE}.")
    beside = (files.weights.with_name(name) for name in (CONFIG, PREPROCESSOR_CONFIG, MODEL_CARD))
    if path.resolve() in {file.resolve() for file in (*weights.files, *beside)}:
        raise InputError(f"--report {path} is a file of the source. Expected another name; the source is not changed.")

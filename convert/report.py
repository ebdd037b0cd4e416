"""What a conversion did, as a value that goes into report.json: complete, so that nobody has to ask again."""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import poolformer_jax
from convert.conversion import Mapped, Source
from poolformer_jax.errors import InputError
from poolformer_jax.images import processor_config
from poolformer_jax.weights import WeightsMismatch
from poolformer_jax.weights.containers.files import WeightsFile
from poolformer_jax.weights.names import LAYOUTS
from poolformer_jax.weights.source import CONFIG, WEIGHTS, ModelFiles

FILE = "report.json"


def describe_source(source: Source) -> dict[str, Any]:
    """What a model's files are and which network they are of."""
    config = source.config
    return {
        **describe_file(source.weights),
        "layout": source.layout,
        "variant": source.plan.detection.variant,
        "head_order": config.head_order,
        "num_labels": config.num_labels,
        "labels_named": config.id2label is not None,
        "parameters": sum(math.prod(leaf.shape) for leaf in source.plan.leaves),
        "config": config.to_dict(),
        "config_file": str(source.files.config) if source.files.config else None,
        "preprocessing": source.processor.to_dict() if source.processor else None,
    }


def describe_file(weights: WeightsFile) -> dict[str, Any]:
    """What a weights file is, whatever it is of."""
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
    """Every file that was read, with its hash."""
    return [{"path": str(path), "bytes": path.stat().st_size, "sha256": _sha256(path)} for path in weights.files]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_conversion(
    source: Source, files: list[dict[str, Any]], destination: Path, layout: str, mapped: list[Mapped]
) -> dict[str, Any]:
    """The whole account of a conversion in which everything fitted."""
    return {
        "program": f"poolformer-jax {poolformer_jax.__version__}",
        "source": {"given": source.given, "files": files, **describe_source(source)},
        "destination": {
            "folder": str(destination),
            "layout": layout,
            "head_order": LAYOUTS[layout].head_order or source.config.head_order,
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
            for one in mapped
        ],
        **left_over(None),
    }


def left_over(error: WeightsMismatch | None) -> dict[str, Any]:
    """The names that did not fit; empty lists if all did."""
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


def check(path: Path, destination: Path) -> None:
    """Refuses a report's name under which no file can be, before anything is converted.

    Raises:
        ValueError: if it is that of a folder, below a file, or that of a file of the model in `destination`.
    """
    if path.is_dir():
        raise InputError(f"--report {path} is a folder. Expected the name of a file, such as {path / FILE}.")
    if files := [parent for parent in path.parents if parent.exists() and not parent.is_dir()]:
        raise InputError(f"--report {path} cannot be a file, because {files[0]} is one. Expected a name in a folder.")
    held = (CONFIG, processor_config.FILE, *WEIGHTS)
    if path.resolve() in (destination.resolve(), *((destination / name).resolve() for name in held)):
        raise InputError(f"--report {path} would take the place of the model. Expected another name, such as {FILE}.")


def check_spares(path: Path, files: ModelFiles, weights: WeightsFile) -> None:
    """Refuses a report's name that is of a file of the source.

    Raises:
        ValueError: if it is.
    """
    beside = (files.weights.with_name(name) for name in (CONFIG, processor_config.FILE))
    if path.resolve() in {file.resolve() for file in (*weights.files, *beside)}:
        raise InputError(f"--report {path} is a file of the source. Expected another name, to leave it as it is.")

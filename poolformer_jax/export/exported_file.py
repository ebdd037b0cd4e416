"""Reading exported files: their metadata, and the logits that they compute."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from poolformer_jax.errors import InputError, MissingDependencyError
from poolformer_jax.export.openvino_file import SECTION
from poolformer_jax.export.stablehlo_file import run_stablehlo
from poolformer_jax.files import read_json
from poolformer_jax.images import PoolFormerImageProcessor
from poolformer_jax.inference import difference_from_network, import_runtime, load_onnxruntime, load_openvino
from poolformer_jax.network import PoolFormerConfig

# The metadata and the function of `ExportedFile`.
_Opened: TypeAlias = tuple[Mapping[str, str], Callable[[np.ndarray], np.ndarray]]
_EXPECTED = "Expected a file of python -m poolformer_jax export."


class ExportedFile(NamedTuple):
    """A file that `export_model` wrote."""

    facts: Mapping[str, str]  # its metadata (`metadata`)
    run: Callable[[np.ndarray], np.ndarray]  # from pixels, of the type that the file takes, to logits
    config: PoolFormerConfig  # the architecture
    image_processor: PoolFormerImageProcessor  # the preprocessing
    labels: Mapping[int, str]  # class names by index
    takes_uint8: bool  # True if it takes 8-bit pixels and normalises them, False if it takes normalised pixels


def open_exported(path: Path) -> ExportedFile:
    """Reads an .onnx, .xml or .stablehlo file.

    Raises ValueError if it is not one of this package's; ModuleNotFoundError, naming the package that runs it.
    """
    try:
        match path.suffix.lower():
            case ".onnx":
                facts, run = _open_onnx(path)
            case ".xml":
                facts, run = _open_openvino(path)
            case _:
                facts = read_json(path.with_name(f"{path.name}.json"), "an object, the metadata of an exported file")
                run = partial(run_stablehlo, path.read_bytes())
    except ImportError as error:
        raise MissingDependencyError(f"Running {path.name} needs a package that is not installed ({error}).") from error
    try:
        return ExportedFile(
            facts,
            run,
            PoolFormerConfig.from_dict(json.loads(facts["config"])),
            PoolFormerImageProcessor.from_dict(json.loads(facts["preprocessor_config"])),
            {int(index): label for index, label in json.loads(facts["id2label"]).items()},
            takes_uint8=facts["input"].startswith("pixel_values: uint8"),
        )
    except KeyError as error:
        raise InputError(f"{path} has no {error} in its metadata. {_EXPECTED}") from error


def verify_file(path: Path, config: PoolFormerConfig, variables: Mapping[str, Any]) -> float:
    """The largest difference of a file's logits from the network's, relative to the largest of these.

    Raises ValueError if the file is not one of this package's, or has another input or number of labels; ExportError if
    the difference is too large for rounding.
    """
    exported = open_exported(path)
    processor = exported.image_processor
    assert processor.output_size is not None, "export_model writes one"
    difference = difference_from_network(
        exported.run,
        config,
        variables,
        processor.output_size,
        exported.facts["dtype"],
        normalization=processor if exported.takes_uint8 else None,
    )
    assert difference is not None, "the file was run"
    return difference


def _open_onnx(path: Path) -> _Opened:
    import onnxruntime

    run = load_onnxruntime(path)
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return session.get_modelmeta().custom_metadata_map, lambda pixels: run(pixels, "logits")


def _open_openvino(path: Path) -> _Opened:
    run = load_openvino(path)
    network = import_runtime("openvino").Core().read_model(path)
    if not network.has_rt_info(SECTION):
        raise InputError(f"{path} has no metadata. {_EXPECTED}")
    facts = {key: str(value) for key, value in network.get_rt_info(SECTION).value.items()}
    return facts, lambda pixels: run(pixels, "logits")

"""Reading exported files: their metadata, and the logits that they compute."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from poolformer_jax.errors import InputError, MissingDependencyError, PoolFormerError
from poolformer_jax.export.openvino_file import SECTION
from poolformer_jax.export.stablehlo_file import run_stablehlo
from poolformer_jax.files import check_file, parse_json, read_json
from poolformer_jax.images import PoolFormerImageProcessor
from poolformer_jax.inference import (
    TOLERANCES,
    difference_from_network,
    import_runtime,
    load_openvino,
    onnxruntime_session,
    run_session,
)
from poolformer_jax.network import PoolFormerConfig

# The metadata and the function of `ExportedFile`.
_Opened: TypeAlias = tuple[Mapping[str, str], Callable[[np.ndarray], np.ndarray]]
_EXPECTED = "a file of python -m poolformer_jax export"
_LARGEST = 1 << 31  # bytes; ONNX files have at most as many
_LARGEST_GRAPH = 1 << 26  # bytes of an .xml, whose numbers are in the .bin


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
    graph = path.suffix.lower() == ".xml"
    with _naming(path):
        check_file(path, _LARGEST_GRAPH if graph else _LARGEST, _EXPECTED)
        if graph:
            check_file(path.with_suffix(".bin"), _LARGEST, "the numbers of the .xml")
            facts, run = _open_openvino(path)
        elif path.suffix.lower() == ".onnx":
            facts, run = _open_onnx(path)
        else:
            facts = read_json(path.with_name(f"{path.name}.json"), "an object, the metadata of an exported file")
            run = partial(run_stablehlo, path.read_bytes())
        network, preprocessing, labels = (
            parse_json(facts[name], path, f"an object, {name}, in its metadata")
            for name in ("config", "preprocessor_config", "id2label")
        )
        try:
            config = PoolFormerConfig.from_dict(network)
            named = config.with_changes(id2label=labels, num_labels=config.num_labels)
            processor = PoolFormerImageProcessor.from_dict(preprocessing)
        except InputError as error:
            raise InputError(f"The metadata of {path} is malformed: {error}") from error
        exported = ExportedFile(
            facts,
            partial(_run, path, run),
            config,
            processor,
            named.id2label or {},
            takes_uint8=facts["input"].startswith("pixel_values: uint8"),
        )
        if exported.image_processor.output_size is None or facts["dtype"] not in TOLERANCES:
            raise InputError(f"{path} has no type or size of images in its metadata. Expected {_EXPECTED}.")
        return exported


def _run(path: Path, run: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray) -> np.ndarray:
    with _naming(path):
        return run(pixels)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns what the runtimes raise for a foreign or damaged file into one error that names it.

    Only for blocks that do nothing but read or run this file: each runtime has exceptions of all kinds.
    """
    try:
        yield
    except (PoolFormerError, MemoryError):
        raise
    except ImportError as error:
        raise MissingDependencyError(f"Running {path.name} needs a package that is not installed ({error}).") from error
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be used ({type(error).__name__}: {reason}). Expected {_EXPECTED}.") from error


def verify_file(path: Path, config: PoolFormerConfig, variables: Mapping[str, Any]) -> float:
    """The largest difference of a file's logits from the network's, relative to the largest of these.

    Raises ValueError if the file is not one of this package's, or has another input or number of labels; ExportError if
    the difference is too large for rounding.
    """
    exported = open_exported(path)
    processor = exported.image_processor
    assert processor.output_size is not None, "open_exported checks it"
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
    session = onnxruntime_session(path.read_bytes())
    return session.get_modelmeta().custom_metadata_map, lambda pixels: run_session(session, pixels, "logits")


def _open_openvino(path: Path) -> _Opened:
    run = load_openvino(path)
    network = import_runtime("openvino").Core().read_model(path)
    if not network.has_rt_info(SECTION):
        raise InputError(f"{path} has no metadata. Expected {_EXPECTED}.")
    facts = {key: str(value) for key, value in network.get_rt_info(SECTION).value.items()}
    return facts, lambda pixels: run(pixels, "logits")

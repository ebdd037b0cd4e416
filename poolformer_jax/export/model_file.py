"""The network as a file that runs without this package: StableHLO for jax, OpenVINO's IR, ONNX for everything else.

All hold the folded network with its parameters: float32 `pixel_values` [batch, height, width, channels], normalised,
to float32 `logits` [batch, num_labels], for a batch of any size. Preprocessing and labels travel along as metadata (see
`metadata`): in ONNX as metadata_props, in OpenVINO as rt_info, for StableHLO in a JSON file beside it. Without this
package, run

    network = jax.export.deserialize(bytearray(open("s12.stablehlo", "rb").read()))
    logits = network.call(pixel_values)
    facts = json.load(open("s12.stablehlo.json"))

    session = onnxruntime.InferenceSession("s12.onnx")
    (logits,) = session.run(None, {"pixel_values": pixel_values})
    facts = session.get_modelmeta().custom_metadata_map

Before a file appears, its logits are compared with those of the network that is not folded.
"""

import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype

from poolformer_jax.errors import InputError, MissingDependencyError, MissingFileError
from poolformer_jax.export.metadata import metadata
from poolformer_jax.export.openvino_file import run_openvino, to_openvino
from poolformer_jax.export.stablehlo_file import run_stablehlo, to_stablehlo
from poolformer_jax.files import replace_atomically, sync
from poolformer_jax.images import PoolFormerImageProcessor
from poolformer_jax.inference import (
    Parameters,
    difference_from_network,
    fold,
    onnxruntime_session,
    quantize_int8,
    run_session,
    takes_any_size,
    to_onnx,
)
from poolformer_jax.network import PoolFormerConfig, check_has_probabilities
from poolformer_jax.weights import class_names

FORMATS = (".stablehlo", ".onnx", ".xml")
# The types that each format can be written in. ONNX and OpenVINO store float16, and compute in float32 on CPUs.
_DTYPES = {
    ".stablehlo": ("float32", "bfloat16"),
    ".onnx": ("float32", "float16", "int8"),
    ".xml": ("float32", "float16"),
}
_NAMES = {".stablehlo": "StableHLO", ".onnx": "ONNX", ".xml": "OpenVINO"}


def export_model(
    file: str | os.PathLike[str],
    config: PoolFormerConfig,
    variables: Mapping[str, Any],
    image_processor: PoolFormerImageProcessor,
    id2label: Mapping[int, str] | Sequence[str] | None = None,
    *,
    image_size: tuple[int, int] | None = None,
    dtype: Dtype = jnp.float32,
    uint8: bool = False,
    probabilities: bool = False,
) -> float | None:
    """Writes the network to `file`, completely or not at all.

    Where two files replace two old ones, a kill or an I/O error may leave neither network, but never a mixed pair.

    Args:
        file: ends in .onnx, in .xml (OpenVINO; a second file ends in .bin), or in .stablehlo (a second file, `file` +
            ".json", has the metadata); case does not matter.
        config: the architecture.
        variables: `{"params": tree}`.
        image_processor: the preprocessing that the metadata describes.
        id2label: class names by index, or a list of them, for the metadata; None for the config's, or ImageNet's for a
            published network with 1000 classes, or "class 0", "class 1", ...
        image_size: height and width of the input in pixels. By default those of the images that `image_processor`
            makes, and an ONNX file takes images of any size unless the network has parameters for every position
            (position embeddings, spatial_fc, random).
        dtype: float32, or bfloat16 for feature maps in StableHLO, or float16 for the stored numbers in ONNX and
            OpenVINO, or int8 for the kernels in ONNX (`quantize_int8`).
        uint8: the file takes 8-bit pixels, resized and cropped, and normalises them.
        probabilities: the file also gives the probabilities, as a second output.

    Returns:
        The largest difference from the network's own logits, relative to the largest of these; None for ONNX if ONNX
        Runtime is not installed.

    Raises:
        ValueError: for another ending, an image size that the network does not take, or weights whose logits are not
            finite.
        OSError: if the folder of `file` does not exist.
        ModuleNotFoundError: naming the extra to install.
        ExportError: if the converted network computes other logits; nothing is written then.
    """
    path = Path(file).expanduser()
    ending = path.suffix.lower()
    if ending not in FORMATS:
        raise InputError(f"The file {os.fspath(file)!r} names no format. Expected it to end in {' or '.join(FORMATS)}.")
    second = {".stablehlo": path.with_name(f"{path.name}.json"), ".xml": path.with_suffix(".bin")}.get(ending)
    _check_paths(path, second)  # before a conversion that can take minutes
    precision = _check_dtype(ending, dtype)
    if probabilities:
        check_has_probabilities(config)
    size = image_size or image_processor.output_size
    if size is None:
        raise InputError("The preprocessing makes images of many sizes. Pass image_size=(height, width) in pixels.")
    any_size = ending != ".stablehlo" and image_size is None and takes_any_size(config)
    named = config if id2label is None else config.with_changes(id2label=id2label, num_labels=config.num_labels)
    facts = metadata(
        config,
        image_processor,
        class_names(named),
        size,
        any_size=any_size,
        dtype=precision,
        uint8=uint8,
        probabilities=probabilities,
    )
    normalization = image_processor if uint8 else None
    options: Any = {"normalization": normalization, "probabilities": probabilities}
    folded = fold(config, variables)
    try:
        if ending == ".stablehlo":
            data = to_stablehlo(config, folded, size, dtype, **options)
            converted = _Converted(data, f"{json.dumps(facts, indent=2)}\n".encode(), partial(run_stablehlo, data))
        else:
            converted = _convert_to_onnx(path, config, folded, size, facts, any_size, precision, options)
    except ImportError as error:
        package = " and openvino" if ending == ".xml" else ""
        raise MissingDependencyError(
            f"Exporting needs a package that is not installed ({error}). Install: pip install -e '.[export]'{package}"
        ) from error
    difference = difference_from_network(converted.run, config, variables, size, precision, normalization=normalization)
    _write(path, second, converted)
    return difference


class _Converted(NamedTuple):
    """The contents of the file and of the one beside it, and a function from pixels to the logits that they compute."""

    data: bytes
    second: bytes
    run: Callable[[np.ndarray], np.ndarray | None]


def _convert_to_onnx(
    path: Path,
    config: PoolFormerConfig,
    folded: Parameters,
    image_size: tuple[int, int],
    facts: Mapping[str, str],
    any_size: bool,
    precision: str,
    options: Mapping[str, Any],
) -> _Converted:
    """The contents of an ONNX file, or of OpenVINO's two, which are made from ONNX."""
    half = precision == "float16"
    onnx = to_onnx(config, folded, image_size, facts, any_size=any_size, half_precision=half, **options)
    if precision == "int8":
        onnx = quantize_int8(onnx, path.parent)
    if path.suffix.lower() == ".xml":
        xml, numbers = to_openvino(onnx, facts, path.parent, half_precision=half)
        return _Converted(xml, numbers, partial(run_openvino, xml, numbers))
    return _Converted(onnx, b"", partial(_run_onnx, onnx))


def _run_onnx(data: bytes, pixel_values: np.ndarray) -> np.ndarray | None:
    """The logits of an ONNX model; None if ONNX Runtime is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    return run_session(onnxruntime_session(data), pixel_values, "logits")


def _write(path: Path, second: Path | None, converted: _Converted) -> None:
    with replace_atomically(path) as temporary:
        temporary.write_bytes(converted.data)
        if second is not None:
            with replace_atomically(second) as temporary_second:
                temporary_second.write_bytes(converted.second)
                # The old network goes before the second file changes, and the new one comes after it: no network is
                # ever beside the metadata or the numbers of another one.
                path.unlink(missing_ok=True)
                sync(path.parent)


def _check_paths(path: Path, second: Path | None) -> None:
    if not path.parent.is_dir():
        raise MissingFileError(f"There is no folder {path.parent} to write {path.name} into. Make it first.")
    for file in (path, second):
        if file is not None and file.is_dir():
            raise InputError(f"{file} is a folder. Expected the name of a file to write.")


def _check_dtype(ending: str, dtype: Dtype) -> str:
    """The name of `dtype`. Raises InputError unless the format has it."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in _DTYPES[ending]:
        raise InputError(
            f"dtype={name} cannot be exported to {_NAMES[ending]}. Expected {' or '.join(_DTYPES[ending])}."
        )
    return name

"""The network as one file that runs without this package: StableHLO for jax, ONNX for everything else.

Both hold the folded network with its parameters: float32 `pixel_values` [batch, height, width, channels], normalised,
to float32 `logits` [batch, num_labels], for a batch of any size. Preprocessing and labels travel along as metadata (see
`metadata`): in ONNX as metadata_props, for StableHLO in a JSON file beside it. Without this package, run

    network = jax.export.deserialize(bytearray(open("s12.stablehlo", "rb").read()))
    logits = network.call(pixel_values)
    facts = json.load(open("s12.stablehlo.json"))

    session = onnxruntime.InferenceSession("s12.onnx")
    (logits,) = session.run(None, {"pixel_values": pixel_values})
    facts = session.get_modelmeta().custom_metadata_map

Before a file appears, its logits are compared with those of the network that is not folded.
"""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax.typing import Dtype

from poolformer_jax.errors import InputError, MissingDependencyError, MissingFileError
from poolformer_jax.export.metadata import metadata
from poolformer_jax.export.stablehlo_file import run_stablehlo, to_stablehlo
from poolformer_jax.files import replace_atomically, write_json
from poolformer_jax.images import PoolFormerImageProcessor
from poolformer_jax.inference import TOLERANCES, difference_from_network, fold, run_onnx, takes_any_size, to_onnx
from poolformer_jax.network import PoolFormerConfig, check_dtype
from poolformer_jax.weights import class_names

FORMATS = (".stablehlo", ".onnx")


def export_model(
    file: str | os.PathLike[str],
    config: PoolFormerConfig,
    variables: Mapping[str, Any],
    image_processor: PoolFormerImageProcessor,
    id2label: Mapping[int, str] | None = None,
    *,
    image_size: tuple[int, int] | None = None,
    dtype: Dtype = jnp.float32,
) -> float | None:
    """Writes the network to `file`, completely or not at all.

    Args:
        file: ends in .onnx, or in .stablehlo (a second file, `file` + ".json", has the metadata); case does not matter.
        config: the architecture.
        variables: `{"params": tree}`.
        image_processor: the preprocessing that the metadata describes.
        id2label: class names by index, for the metadata; None for the config's, or ImageNet's for a published
            network with 1000 classes, or "class 0", "class 1", ...
        image_size: height and width of the input in pixels. By default those of the images that `image_processor`
            makes, and an ONNX file takes images of any size unless the network has parameters for every position
            (position embeddings, spatial_fc, random).
        dtype: type that feature maps are computed in; ONNX takes float32 only.

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
    metadata_path = path.with_name(f"{path.name}.json") if ending == ".stablehlo" else None
    _check_paths(path, metadata_path)  # before a conversion that can take minutes
    _check_dtype(ending, dtype)
    size = image_size or image_processor.output_size
    if size is None:
        raise InputError("The preprocessing makes images of many sizes. Pass image_size=(height, width) in pixels.")
    any_size = ending == ".onnx" and image_size is None and takes_any_size(config)
    facts = metadata(config, image_processor, id2label or class_names(config), size, any_size=any_size)
    folded = fold(config, variables)
    try:
        if ending == ".onnx":
            data = to_onnx(config, folded, size, facts, any_size=any_size)
            run: Any = partial(run_onnx, data)
        else:
            data = to_stablehlo(config, folded, size, dtype)
            run = partial(run_stablehlo, data)
    except ImportError as error:
        raise MissingDependencyError(
            f"Exporting needs a package that is not installed ({error}). Install: pip install -e '.[export]'"
        ) from error
    difference = difference_from_network(run, config, variables, size, dtype)
    with replace_atomically(path) as temporary:
        temporary.write_bytes(data)
        if metadata_path is not None:  # written before `path` appears: a network never lacks its metadata
            write_json(metadata_path, facts)
    return difference


def _check_paths(path: Path, metadata_path: Path | None) -> None:
    if not path.parent.is_dir():
        raise MissingFileError(f"There is no folder {path.parent} to write {path.name} into. Make it first.")
    for file in (path, metadata_path):
        if file is not None and file.is_dir():
            raise InputError(f"{file} is a folder. Expected the name of a file to write.")


def _check_dtype(ending: str, dtype: Dtype) -> None:
    check_dtype(dtype)
    name = jnp.dtype(dtype).name
    if name not in TOLERANCES:
        raise InputError(f"dtype={name} cannot be exported. Expected {' or '.join(TOLERANCES)}.")
    if ending == ".onnx" and name != "float32":
        raise InputError(f"dtype={name} cannot be exported to ONNX. Expected float32.")

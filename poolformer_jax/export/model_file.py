"""The network as one file that runs without this package: StableHLO for jax, ONNX for everything else.

Both hold the folded network with its parameters: float32 `pixel_values` [batch, height, width, channels], normalised,
to float32 `logits` [batch, num_labels], for a batch of any size. What has to happen before and after travels along as
metadata (see `metadata`): in ONNX as metadata_props, for StableHLO in a JSON file beside it. A stranger runs

    network = jax.export.deserialize(bytearray(open("s12.stablehlo", "rb").read()))
    logits = network.call(pixel_values)
    facts = json.load(open("s12.stablehlo.json"))

    session = onnxruntime.InferenceSession("s12.onnx")
    (logits,) = session.run(None, {"pixel_values": pixel_values})
    facts = session.get_modelmeta().custom_metadata_map

The folded network is what is written, and the network itself is what it is checked against before a file appears.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jaxtyping import Float32

from poolformer_jax.errors import InputError, MissingDependencyError, MissingFileError
from poolformer_jax.export.onnx_operations import network_graph
from poolformer_jax.files import replace_atomically, write_json
from poolformer_jax.images.processor import PoolFormerImageProcessor
from poolformer_jax.inference.folding import fold
from poolformer_jax.inference.jax_operations import folded_apply
from poolformer_jax.network.config import PoolFormerConfig
from poolformer_jax.network.model import PoolFormerForImageClassification, check_dtype
from poolformer_jax.version import __version__

FORMATS = (".stablehlo", ".onnx")
PLATFORMS = ("cpu", "cuda", "tpu")
# Old enough for the runtimes of phones and browsers; nothing in the network needs a newer one.
_ONNX_OPSET = 18
# Of the file format, as it was when that operator set came (ONNX 1.13).
_ONNX_IR_VERSION = 8
# Of the largest logit. Rounding stays well below, a wrong operation does not.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


class ExportError(InputError):
    """A conversion that computes something else than the network."""


def export_model(
    file: str | os.PathLike[str],
    config: PoolFormerConfig,
    variables: Mapping[str, Any],
    image_processor: PoolFormerImageProcessor,
    id2label: Mapping[int, str],
    *,
    image_size: tuple[int, int] | None = None,
    dtype: Dtype = jnp.float32,
) -> float | None:
    """Writes the network to `file`, whole or not at all.

    Args:
        file: ends in .stablehlo (a second file, `file` + ".json", has the metadata) or in .onnx, in any case.
        config: the architecture.
        variables: `{"params": tree}`.
        image_processor: the preprocessing that the metadata describes.
        id2label: class names by index, for the metadata.
        image_size: height and width of the input in pixels; by default what `image_processor` makes.
        dtype: type that feature maps are computed in; ONNX takes float32 only.

    Returns:
        The largest difference from the network's own logits, relative to the largest of these; None where ONNX Runtime
        is not installed to compute it.

    Raises:
        ValueError: for another ending, an image size that the network does not take, or weights that give no numbers.
        OSError: if there is no folder for `file`, or a folder in its place.
        ModuleNotFoundError: naming the extra to install.
        ExportError: if the converted network computes other logits; nothing is written then.
    """
    path = Path(file).expanduser()
    ending = path.suffix.lower()
    if ending not in FORMATS:
        raise InputError(f"The file {os.fspath(file)!r} names no format. Expected it to end in {' or '.join(FORMATS)}.")
    if not path.parent.is_dir():  # before the minutes that a conversion can take
        raise MissingFileError(f"There is no folder {path.parent} to write {path.name} into. Make it first.")
    beside = path.with_name(f"{path.name}.json") if ending == ".stablehlo" else None
    for one in (path, beside):
        if one is not None and one.is_dir():
            raise InputError(f"{one} is a folder. Expected the name of a file to write.")
    size = image_size or image_processor.output_size
    if size is None:
        raise InputError("The preprocessing makes images of many sizes. Say image_size=(height, width) in pixels.")
    facts = metadata(config, image_processor, id2label, size)
    example = np.random.default_rng(0).standard_normal((2, *size, config.num_channels), np.float32)
    check_dtype(dtype)
    if jnp.dtype(dtype).name not in _TOLERANCE:
        raise InputError(f"dtype={jnp.dtype(dtype).name} cannot be exported. Expected {' or '.join(_TOLERANCE)}.")
    if ending == ".onnx":
        if jnp.dtype(dtype) != jnp.float32:
            raise InputError(f"dtype={jnp.dtype(dtype).name} cannot be exported to ONNX. Expected float32.")
        data = to_onnx(config, variables, size, facts)
        difference = _difference(config, variables, dtype, example, _run_onnx(data, example))
    else:
        data = to_stablehlo(config, variables, size, dtype)
        logits = jax.export.deserialize(bytearray(data)).call(example)
        difference = _difference(config, variables, dtype, example, logits)
    with replace_atomically(path) as temporary:  # the network comes last: what has a network has its metadata
        temporary.write_bytes(data)
        if beside is not None:
            write_json(beside, facts)
    return difference


def metadata(
    config: PoolFormerConfig,
    image_processor: PoolFormerImageProcessor,
    id2label: Mapping[int, str],
    image_size: tuple[int, int],
) -> dict[str, str]:
    """What one has to know to use the exported file; every value is text, where it has parts JSON.

    Keys: `config`, `preprocessor_config` (both as on the Hub), `id2label`, `input`, `output`, `producer`.
    """
    height, width = image_size
    colours = "greyscale" if config.num_channels == 1 else "RGB"
    if config.num_labels:
        output = f"logits: float32 [batch, {config.num_labels}]; their softmax is the probability of each id2label"
    else:
        output = f"logits: float32 [batch, {config.hidden_sizes[-1]}]; pooled and normalised, there is no head"
    return {
        "config": json.dumps(config.to_dict()),
        "preprocessor_config": json.dumps(_making(image_processor, image_size).to_dict()),
        "id2label": json.dumps({str(index): label for index, label in sorted(id2label.items())}),
        "input": f"pixel_values: float32 [batch, {height}, {width}, {config.num_channels}], resized, cropped, rescaled "
        f"and normalised as preprocessor_config says; channels last, {colours}",
        "output": output,
        "producer": f"poolformer-jax {__version__}",
    }


def _making(image_processor: PoolFormerImageProcessor, image_size: tuple[int, int]) -> PoolFormerImageProcessor:
    """The same preprocessing, for pictures of `image_size`."""
    if image_processor.output_size == image_size:
        return image_processor
    sides = dict(zip(("height", "width"), image_size))
    size = {"shortest_edge": image_size[0]} if image_size[0] == image_size[1] else sides
    return dataclasses.replace(image_processor, do_resize=True, size=size, do_center_crop=True, crop_size=sides)


def to_stablehlo(
    config: PoolFormerConfig, variables: Mapping[str, Any], image_size: tuple[int, int], dtype: Dtype = jnp.float32
) -> bytes:
    """What `jax.export.deserialize` reads: the network for every one of `PLATFORMS`, with a symbolic batch.

    jax promises to read it for six months of later versions, and a runtime three weeks older.
    """
    (batch,) = jax.export.symbolic_shape("batch")
    pixels = jax.ShapeDtypeStruct((batch, *image_size, config.num_channels), jnp.float32)
    network = partial(folded_apply, config, fold(config, variables), dtype=dtype)
    try:
        return bytes(jax.export.export(jax.jit(network), platforms=PLATFORMS)(pixels).serialize())
    except ImportError as error:
        raise _missing("flatbuffers", error) from error


def to_onnx(
    config: PoolFormerConfig, variables: Mapping[str, Any], image_size: tuple[int, int], facts: Mapping[str, str]
) -> bytes:
    """An ONNX model with the input "pixel_values", whose batch is free, and the output "logits"."""
    try:
        import onnx
        from onnx import helper, numpy_helper
    except ImportError as error:
        raise _missing("onnx", error) from error
    graph = network_graph(config, jax.tree.map(np.asarray, fold(config, variables)), image_size)
    nodes = [
        helper.make_node(node.operation, node.inputs, [node.output], node.name, **node.attributes)
        for node in graph.nodes
    ]
    shapes = {
        "pixel_values": ("batch", *image_size, config.num_channels),
        "logits": ("batch", config.num_labels or config.hidden_sizes[-1]),
    }
    pixels, logits = (
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)] for name, shape in shapes.items()
    )
    constants = [numpy_helper.from_array(value, name) for name, value in graph.constants.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "poolformer", pixels, logits, constants),
        opset_imports=[helper.make_opsetid("", _ONNX_OPSET)],
        ir_version=_ONNX_IR_VERSION,
    )
    helper.set_model_props(model, dict(facts))
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def _run_onnx(data: bytes, pixel_values: Float32[np.ndarray, "b h w c"]) -> Float32[np.ndarray, "b labels"] | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"pixel_values": pixel_values})
    return np.asarray(logits)


def _difference(
    config: PoolFormerConfig,
    variables: Mapping[str, Any],
    dtype: Dtype,
    pixel_values: Float32[np.ndarray, "b h w c"],
    logits: Any,
) -> float | None:
    """How far the exported logits are from the network's own, which neither folding nor conversion has touched."""
    if logits is None:
        return None
    output: Any = jax.jit(PoolFormerForImageClassification(config).apply)(variables, pixel_values)
    expected = np.asarray(output.logits)
    if not np.isfinite(expected).all():
        raise InputError("The network's own logits are infinite or no numbers. Expected finite weights; check them.")
    largest = np.abs(expected).max() or 1  # a head of zeros has no larger one: then the difference itself
    difference = float(np.abs(np.asarray(logits) - expected).max() / largest)
    if not difference <= _TOLERANCE[jnp.dtype(dtype).name]:
        raise ExportError(
            f"The converted network computes other logits: they differ by {difference:.1e} of the largest one. "
            "Nothing was written. Please report this with the versions of jax, onnx and onnxruntime."
        )
    return difference


def _missing(names: str, error: ImportError) -> MissingDependencyError:
    return MissingDependencyError(f"Exporting needs {names} ({error}). Install: pip install 'poolformer-jax[export]'")

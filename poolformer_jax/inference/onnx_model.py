"""The folded network as an ONNX file."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from poolformer_jax.files import staging_folder
from poolformer_jax.images import PoolFormerImageProcessor
from poolformer_jax.inference.description import Parameters
from poolformer_jax.inference.onnx_operations import network_graph
from poolformer_jax.network import PoolFormerConfig

# Without it, ONNX Runtime 1.32 sends usage data, and keeps an identifier of this machine in the user's cache. Where it
# cannot write there, it prints a coloured warning at every start.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# Old enough for the runtimes of phones and browsers. The network needs no newer operator.
_OPSET = 18
# Version of the file format when that operator set came out (ONNX 1.13).
_IR_VERSION = 8
# Numbers from which an array is worth storing in 16 bits.
_LARGE = 1024


def to_onnx(
    config: PoolFormerConfig,
    folded: Parameters,
    image_size: tuple[int, int],
    metadata: Mapping[str, str],
    *,
    any_size: bool = False,
    normalization: PoolFormerImageProcessor | None = None,
    probabilities: bool = False,
    half_precision: bool = False,
) -> bytes:
    """An ONNX model with the input "pixel_values", for a batch of any size, and the output "logits".

    The options are those of `export_model`; `folded` is what `fold` returns. With `half_precision` the kernels are
    stored in float16 and cast to float32 before they are used, because squared activations and the norms' sums can
    exceed float16's largest number. Raises ValueError for an image size that the network does not take; ImportError
    without onnx.
    """
    import onnx
    from onnx import helper, numpy_helper

    parameters = jax.tree.map(np.asarray, folded)
    graph = network_graph(config, parameters, image_size, normalization=normalization, probabilities=probabilities)
    nodes = [
        helper.make_node(node.operation, node.inputs, [node.output], node.name, **node.attributes)
        for node in graph.nodes
    ]
    float32, uint8 = onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8
    shape = ("batch", *(("height", "width") if any_size else image_size), config.num_channels)
    pixels = helper.make_tensor_value_info("pixel_values", float32 if normalization is None else uint8, shape)
    outputs = [
        helper.make_tensor_value_info(name, float32, ("batch", config.num_labels or config.hidden_sizes[-1]))
        for name in ("logits", "probabilities")[: 1 + probabilities]
    ]
    constants, casts = [], []
    for name, value in graph.constants.items():
        stored = name
        if half_precision and value.size >= _LARGE:
            stored, value = f"{name}/float16", value.astype(np.float16)
            casts.append(helper.make_node("Cast", [stored], [name], f"{name}/cast", to=float32))
        constants.append(numpy_helper.from_array(value, stored))
    model = helper.make_model(
        helper.make_graph([*casts, *nodes], "poolformer", [pixels], outputs, constants),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
    )
    helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def quantize_int8(data: bytes, folder: Path) -> bytes:
    """An ONNX model with its kernels in int8, one scale for each output channel; the rest stays float32.

    ONNX Runtime quantises the inputs of each layer while it runs, so this needs no calibration images. It
    writes files, which are in `folder` for a moment. Raises ImportError without onnxruntime.
    """
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    with staging_folder(folder) as stage:
        source, target = stage / "float32.onnx", stage / "int8.onnx"
        source.write_bytes(data)
        logging.disable(logging.WARNING)  # it advises a preprocessing that ONNX Runtime does when it loads the file
        try:
            quantize_dynamic(source, target, per_channel=True)
        finally:
            logging.disable(logging.NOTSET)
        quantized = onnx.load(target)
    properties = {entry.key: entry.value for entry in onnx.load_from_string(data).metadata_props}
    onnx.helper.set_model_props(quantized, properties)
    return bytes(quantized.SerializeToString())

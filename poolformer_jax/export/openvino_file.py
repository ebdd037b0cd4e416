"""The folded network as OpenVINO's intermediate representation: an .xml with the graph and a .bin with the numbers."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from poolformer_jax.files import staging_folder
from poolformer_jax.inference import import_runtime, load_openvino

# The metadata's place among OpenVINO's runtime information.
SECTION = "poolformer_jax"


def to_openvino(
    onnx: bytes, metadata: Mapping[str, str], folder: Path, *, half_precision: bool = False
) -> tuple[bytes, bytes]:
    """The contents of the .xml and of the .bin.

    Args:
        onnx: what `to_onnx` returns.
        metadata: kept in the .xml as runtime information, in the section `poolformer_jax`.
        folder: where OpenVINO writes them for a moment.
        half_precision: store the numbers in float16; OpenVINO computes in float32 on CPUs.

    Raises:
        ImportError: without openvino.
    """
    openvino = import_runtime("openvino")
    network = openvino.Core().read_model(onnx, b"")
    for key, value in metadata.items():
        network.set_rt_info(value, [SECTION, key])
    with staging_folder(folder) as stage:
        path = stage / "network.xml"
        openvino.save_model(network, path, compress_to_fp16=half_precision)
        return path.read_bytes(), path.with_suffix(".bin").read_bytes()


def run_openvino(xml: bytes, numbers: bytes, pixel_values: np.ndarray) -> Float32[np.ndarray, "b labels"]:
    """The logits that OpenVINO computes in float32 on the CPU."""
    return load_openvino(xml, numbers)(pixel_values, "logits")

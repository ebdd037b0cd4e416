"""ONNX Runtime and OpenVINO, on the ONNX file that torch.onnx makes of transformers' PoolFormer."""

from pathlib import Path

import numpy as np

from benchmarks.job import Job, read_pixels
from poolformer_jax.cores import available_cores


def onnx_runtime(folder: str) -> Job:
    """Logits of a batch, with every graph optimisation (the default)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cores()
    session = onnxruntime.InferenceSession(_model(folder), options, providers=["CPUExecutionProvider"])
    inputs = {"pixel_values": _pixels(folder)}

    def call() -> np.ndarray:
        return session.run(None, inputs)[0]

    return Job(call, call(), {"onnxruntime": onnxruntime.__version__}, available_cores())


def openvino(folder: str) -> Job:
    """Logits of a batch, in float32: left to itself it would compute in bfloat16 where the processor can."""
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": available_cores(),
    }
    request = openvino.Core().compile_model(_model(folder), "CPU", settings).create_infer_request()
    pixels = _pixels(folder)

    def call() -> np.ndarray:
        return request.infer([pixels], share_inputs=True)[0]

    return Job(call, np.array(call()), {"openvino": openvino.__version__.split("-")[0]}, available_cores())


def _model(folder: str) -> str:
    path = Path(folder) / "model.onnx"
    if not path.exists():
        raise FileNotFoundError(f"{path} was not made: torch.onnx needs the packages onnx and onnxscript.")
    return str(path)


def _pixels(folder: str) -> np.ndarray:
    return np.ascontiguousarray(read_pixels(folder).transpose(0, 3, 1, 2))

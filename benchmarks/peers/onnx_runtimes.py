"""ONNX Runtime and OpenVINO, with the file that torch.onnx makes of transformers' PoolFormer and with our export."""

from pathlib import Path

import numpy as np

from benchmarks.workload import Workload, read_pixels
from poolformer_jax.resources import available_cores


def onnx_runtime(folder: str, ours: bool = False) -> Workload:
    """Logits of a batch, with all graph optimisations (the default)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cores()
    session = onnxruntime.InferenceSession(_model(folder, ours), options, providers=["CPUExecutionProvider"])
    inputs = {"pixel_values": _pixels(folder, ours)}

    def call() -> np.ndarray:
        return session.run(None, inputs)[0]

    return Workload(call, call(), {"onnxruntime": onnxruntime.__version__}, available_cores())


def openvino(folder: str, ours: bool = False) -> Workload:
    """Logits of a batch in float32. By default OpenVINO computes in bfloat16 on processors that support it."""
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": available_cores(),
    }
    core, pixels = openvino.Core(), _pixels(folder, ours)
    model = core.read_model(_model(folder, ours))
    model.reshape(pixels.shape)
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def call() -> np.ndarray:
        return request.infer([pixels], share_inputs=True)[0]

    return Workload(call, np.array(call()), {"openvino": openvino.__version__.split("-")[0]}, available_cores())


def _model(folder: str, ours: bool) -> str:
    path = Path(folder) / ("ours.onnx" if ours else "model.onnx")
    if not path.exists():
        maker = "python -m poolformer_jax export" if ours else "torch.onnx"
        *_, reason = ["no reason", *path.with_name(f"{path.name}.log").read_text(errors="replace").split("\n")[:-1]]
        raise SystemExit(f"{maker} wrote no file: {reason}")
    return str(path)


def _pixels(folder: str, ours: bool) -> np.ndarray:
    pixels = read_pixels(folder)  # our file takes channels last
    return pixels if ours else np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))

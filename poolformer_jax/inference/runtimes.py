"""The network in ONNX Runtime or OpenVINO instead of JAX: exported once, compared with JAX, and kept in a cache.

The cache is a folder inside jax's compilation cache, or the user's cache if jax has none. A file's name is a hash of
everything that it was made from, and of the runtime. A file appears only after this runtime has computed the network's
own logits with it, so a file that is found is used without another comparison. It ends with a checksum: a damaged file
is exported again.
"""

import functools
import hashlib
import importlib
import json
import os
import sys
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, UInt8

from poolformer_jax.errors import InputError, MissingDependencyError
from poolformer_jax.files import remove_abandoned, replace_atomically
from poolformer_jax.images import PoolFormerImageProcessor
from poolformer_jax.inference.folding import fold
from poolformer_jax.inference.onnx_model import to_onnx
from poolformer_jax.inference.program import batch_sizes_up_to, pad_batch
from poolformer_jax.inference.verification import difference_from_network
from poolformer_jax.network import PoolFormerConfig, check_variables
from poolformer_jax.network.fused import largest_divisor
from poolformer_jax.resources import available_cores
from poolformer_jax.version import __version__

_Pixels = UInt8[np.ndarray, "b h w c"] | Float32[np.ndarray, "b h w c"]
# From pixels, of the type that the file takes, and the name of an output to this output.
_Run = Callable[[_Pixels, str], Float32[np.ndarray, "b labels"]]
# Images that a core computes at a time in OpenVINO.
_IMAGES_PER_STREAM = 2
_CHECKSUM_BYTES = 4


class RuntimeProgram:
    """One output of the exported network, float32 [batch, labels or features], by another runtime on the CPU.

    It is used as `program.BatchProgram`, and returns when the batch is computed.

    Args:
        runtime: "openvino" or "onnxruntime".
        config: the architecture, with a head or without.
        variables: `{"params": tree}`.
        image_processor: the preprocessing.
        output: "probabilities"; or "logits", which are the pooled features of a network without a head.
        batch_size: images per batch.

    Raises:
        ModuleNotFoundError: naming the package to install.
        ExportError: if the runtime computes other logits than JAX.
        OSError: if the cache cannot be written.
    """

    def __init__(
        self,
        runtime: str,
        config: PoolFormerConfig,
        variables: Mapping[str, Any],
        image_processor: PoolFormerImageProcessor,
        *,
        output: str,
        batch_size: int,
    ) -> None:
        self._output, self.batch_sizes = output, batch_sizes_up_to(batch_size)
        self._run = _verified(runtime, config, variables, image_processor)

    def __call__(self, images: Sequence[UInt8[np.ndarray, "h w c"]]) -> Float32[np.ndarray, "b labels"]:
        """The rows of at most `batch_sizes[-1]` images, in order, and then rows of the padding."""
        return self._run(pad_batch(images, self.batch_sizes), self._output)


def _verified(
    runtime: str, config: PoolFormerConfig, variables: Mapping[str, Any], image_processor: PoolFormerImageProcessor
) -> _Run:
    """The exported network, loaded by the runtime, after it has computed the network's own logits once."""
    load, size = _LOADERS[runtime], image_processor.output_size
    assert size is not None, "open_stream checks it"
    try:
        version = import_runtime(runtime).__version__
        check_variables(config, variables)
        path = _cache_folder() / f"{_content_hash(runtime, version, config, variables, image_processor)}.onnx"
        remove_abandoned(path.parent)  # of programs that were killed while they exported
        if (kept := _read_cached(path)) is not None:
            return load(kept)
        with_head = config.num_labels > 0
        data = to_onnx(
            config, fold(config, variables), size, {}, normalization=image_processor, probabilities=with_head
        )
    except ImportError as error:
        raise MissingDependencyError(
            f"runtime={runtime!r} needs a package that is not installed ({error}). "
            f"Install: pip install {runtime} onnx; or use runtime='jax'."
        ) from error
    with replace_atomically(path) as temporary:
        temporary.write_bytes(data + _checksum(data))
        run = load(data)
        difference_from_network(
            lambda pixels: run(pixels, "logits"), config, variables, size, "float32", normalization=image_processor
        )
    return run


def _content_hash(
    runtime: str,
    version: str,
    config: PoolFormerConfig,
    variables: Mapping[str, Any],
    image_processor: PoolFormerImageProcessor,
) -> str:
    facts = [__version__, runtime, version, config.to_dict(), image_processor.to_dict()]
    content = hashlib.sha256(json.dumps(facts, default=str).encode())
    for path, leaf in jax.tree.leaves_with_path(variables):
        content.update(jax.tree_util.keystr(path).encode())
        content.update(np.ascontiguousarray(jax.device_get(leaf)).data)
    return content.hexdigest()[:32]


def _read_cached(path: Path) -> bytes | None:
    """The network in a file of the cache; None if the file does not exist or is damaged."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    data, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
    return data if checksum == _checksum(data) else None


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(_CHECKSUM_BYTES)


def _cache_folder() -> Path:
    compiled: str | None = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009 - jax declares no type
    if compiled:
        return Path(compiled) / "exported"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "poolformer_jax" / "exported"


def import_runtime(name: str) -> Any:
    """The package of a runtime; OpenVINO without its telemetry.

    OpenVINO sends usage data from a fork of this process, in which jax's threads are missing. It leaves that out where
    the package of its telemetry cannot be imported.
    """
    telemetry = "openvino_telemetry"
    if telemetry in sys.modules:
        return importlib.import_module(name)
    sys.modules[telemetry] = None  # type: ignore[assignment]  # importing it raises ImportError
    try:
        return importlib.import_module(name)
    finally:
        del sys.modules[telemetry]


def onnxruntime_session(network: bytes) -> Any:
    """The contents of an ONNX file in ONNX Runtime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cores()
    options.log_severity_level = 4  # it prints errors, in colour and with names from the file, besides raising them
    return onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])


def run_session(session: Any, pixels: _Pixels, output: str) -> Float32[np.ndarray, "b labels"]:
    """One output of an ONNX Runtime session."""
    (result,) = session.run([output], {"pixel_values": pixels})
    return np.asarray(result)


def load_onnxruntime(network: Path | bytes) -> _Run:
    """An ONNX file, or its contents, in ONNX Runtime: a function of pixels and the name of an output."""
    data = network if isinstance(network, bytes) else network.read_bytes()
    return functools.partial(run_session, onnxruntime_session(data))


def load_openvino(network: Path | bytes, numbers: bytes = b"") -> _Run:
    """An ONNX or IR file, or the contents of an IR's two, in OpenVINO: a function of pixels and the name of an output.

    All cores share the work on a single image. In a larger batch each core computes other images, a few at a time
    (docs/notes/speed.md). OpenVINO is fastest with a fixed batch, so the network is compiled for every number of images
    at a time when it is first used.
    """
    openvino = import_runtime("openvino")
    core, cores, lock = openvino.Core(), available_cores(), threading.Lock()
    read = core.read_model(network, numbers) if isinstance(network, bytes) else core.read_model(network)
    _square_by_power(read)

    @functools.cache
    def compiled(shape: tuple[int, ...], streams: int) -> Any:
        settings = {
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": cores,
            "INFERENCE_PRECISION_HINT": "f32",  # the default is bfloat16 on processors that have it
        }
        resized = read.clone()
        resized.reshape(shape)
        return openvino.AsyncInferQueue(core.compile_model(resized, "CPU", settings), streams)

    def run(pixels: _Pixels, output: str) -> Float32[np.ndarray, "b labels"]:
        images = len(pixels)
        streams = min(images, cores)
        parts = np.split(pixels, images // largest_divisor(images, min(images // streams, _IMAGES_PER_STREAM)))
        results = {}

        def keep(request: Any, part: int) -> None:
            results[part] = np.array(request.get_tensor(output).data)

        with lock:  # requests and the callback belong to one batch until it is computed
            queue = compiled(parts[0].shape, streams)
            if len(parts) == 1:  # without waking another thread
                queue[0].infer([pixels], share_inputs=True)
                return np.array(queue[0].get_tensor(output).data)
            queue.set_callback(keep)
            for part, some in enumerate(parts):
                queue.start_async([some], part, share_inputs=True)
            queue.wait_all()
        return np.concatenate([results[part] for part in range(len(parts))])

    return run


def _square_by_power(network: Any) -> None:
    """Writes `relu * relu` as a power, which OpenVINO computes faster and ONNX Runtime slower."""
    from openvino import opset13

    for node in network.get_ops():
        if node.get_type_name() == "Multiply" and node.input_value(0) == node.input_value(1):
            (source, _) = node.input_values()
            if source.get_node().get_type_name() == "Relu":
                node.output(0).replace(opset13.power(source, np.float32(2)).output(0))


_LOADERS: Mapping[str, Callable[[bytes], _Run]] = {"openvino": load_openvino, "onnxruntime": load_onnxruntime}
RUNTIMES = ("jax", *_LOADERS)


def check_runtime(runtime: str, **options: bool) -> None:
    """Raises InputError for an unknown runtime, or for options that only JAX has.

    Args:
        runtime: what the caller gave.
        options: by name, whether an option differs from what the other runtimes do.
    """
    if runtime not in RUNTIMES:
        raise InputError(f"runtime={runtime!r}. Expected one of {', '.join(RUNTIMES)}.")
    if runtime != "jax" and (changed := sorted(name for name, differs in options.items() if differs)):
        raise InputError(
            f"runtime={runtime!r} computes the folded network in float32 on the CPU. Expected no {', '.join(changed)}, "
            "or runtime='jax'."
        )

"""Inference on the CPU compared with PyTorch, ONNX Runtime and OpenVINO: same weights, same pixels, all cores, float32.

ours: the folded network that ImageClassifier compiles, from normalised pixels to logits. If the number of cores divides
the batch, one CPU device per core computes a part of it; otherwise one device computes it with all cores. This
benchmark sets JAX_NUM_CPU_DEVICES itself. PyTorch: transformers' PoolFormer, or timm's network of the second paper,
eager and torch.compile, with and without channels_last. ONNX Runtime and OpenVINO: the file that torch.onnx makes of
that model for a fixed batch, and the file that `python -m poolformer_jax export` makes of ours. runtime="...":
ImageClassifier's runtimes, from 8-bit pixels to probabilities. ZeroModels: its PoolFormer in Keras 3 on JAX, jitted.

The weights are random, scaled so that every branch affects the logits. The logits are compared before anything is
timed. Each implementation runs in its own process on all cores, one at a time.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import command_line, report
from benchmarks.comparison import ROOT, Implementation, compare
from benchmarks.inputs import LIBRARY_OF, write_inputs, write_timm_weights
from poolformer_jax import PoolFormerConfig
from poolformer_jax.files import write_json

# Float32 sums in another order. The largest differences seen are 2e-6 (s12) and 1e-5 (m36).
TOLERANCE = 1e-4


def main(arguments: Sequence[str]) -> int:
    """Runs the benchmark, prints its tables, writes JSON, and returns the exit code."""
    options = command_line.parse(_parser(), arguments)
    console, machine, contests = report.create_console(), report.machine(), []
    for variant, batch in itertools.product(options.variants, options.batches):
        library = LIBRARY_OF[variant]
        title = f"{variant}, batch {batch}, float32, {machine['cores']} cores"
        with tempfile.TemporaryDirectory(prefix="cpu-inference-") as name:
            folder = Path(name)
            with console.status(f"{title}: writing the weights and the ONNX files"):
                config = PoolFormerConfig.from_variant(variant)
                write_inputs(folder, config, batch, library)
                if library == "transformers":
                    write_timm_weights(folder, config)  # ZeroModels reads them
                export_onnx(folder, library)
            compared = implementations(folder, library)
            found = compare(console, title, compared, options, images=batch, tolerance=TOLERANCE)
        contests.append({"variant": variant, "batch": batch} | found)
        # After every pair, because the next one can take long.
        write_json(options.json, {"command": options.command, "machine": machine, "contests": contests})
    console.print(f"written to {options.json}", soft_wrap=True)
    return 0


def implementations(folder: Path, library: str = "transformers") -> list[Implementation]:
    """Ours first: the logits of the others are compared with ours."""
    inputs = {"folder": str(folder)}
    torch, onnx = "benchmarks.peers.pytorch:inference", "benchmarks.peers.onnx_runtimes"
    exported, eager = inputs | {"ours": True}, inputs | {"library": library}
    last, compiled = {"channels_last": True}, {"compiled": True}
    cpu = {"JAX_PLATFORMS": "cpu"}
    keras = Implementation(
        "ZeroModels (Keras, JAX)",
        "benchmarks.peers.zeromodels:inference",
        inputs,
        comparable=False,  # it averages before the last norm
        environment=cpu | {"KERAS_BACKEND": "jax"},
    )
    return [
        Implementation("ours", "benchmarks.peers.ours:inference", inputs, ours=True, environment=cpu),
        Implementation("ours, exported, in ONNX Runtime", f"{onnx}:onnx_runtime", exported, ours=True),
        Implementation("ours, exported, in OpenVINO", f"{onnx}:openvino", exported, ours=True),
        *(
            Implementation(
                f'ours, runtime="{runtime}"',
                "benchmarks.peers.ours:runtime",
                inputs | {"runtime": runtime},
                ours=True,
                comparable=False,
                environment=cpu,
            )
            for runtime in ("onnxruntime", "openvino")
        ),
        Implementation("PyTorch", torch, eager),
        Implementation("PyTorch, channels_last", torch, eager | last),
        Implementation("torch.compile", torch, eager | compiled),
        Implementation("torch.compile, channels_last", torch, eager | compiled | last),
        Implementation("ONNX Runtime", f"{onnx}:onnx_runtime", inputs),
        Implementation("OpenVINO", f"{onnx}:openvino", inputs),
        *([keras] if library == "transformers" else []),
    ]


def export_onnx(folder: Path, library: str) -> None:
    """PyTorch writes model.onnx and we write ours.onnx, each in a process. A missing file is reported by its reader.

    The reader finds the reason in a file that ends in .log.
    """
    code = "import sys; from benchmarks.peers.pytorch import export_onnx; export_onnx(*sys.argv[1:])"
    commands = {
        "model.onnx": ["-c", code, str(folder), library],
        "ours.onnx": ["-m", "poolformer_jax", "export", str(folder), str(folder / "ours.onnx")],
    }
    for name, arguments in commands.items():
        with (folder / f"{name}.log").open("w") as errors:
            subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors)


def _parser() -> argparse.ArgumentParser:
    parser = command_line.make_parser("cpu-inference", __doc__, example="--variants s12 --batches 1 --rounds 3")
    command_line.add_variants(parser, LIBRARY_OF, ["s12", "m36"])
    parser.add_argument(
        "--batches", nargs="+", type=int, metavar="N", default=[1, 16], help="images per call (default: 1 16)"
    )
    command_line.add_turns(parser, rounds=9, seconds=1.0)
    return parser

"""Inference on the CPU beside PyTorch, ONNX Runtime and OpenVINO: the same weights, the same pixels, all cores.

Ours is the folded network that ImageClassifier compiles, from normalised pixels to logits: a batch shared by as many
CPU devices as there are cores (JAX_NUM_CPU_DEVICES), one image computed by all of them together. PyTorch runs
transformers' PoolFormer: eager, with channels_last, and through torch.compile with either layout. ONNX Runtime and
OpenVINO run the file that torch.onnx (its default exporter) makes of that same model, at a fixed batch. Everything is
float32.

Weights are random, and such that every branch has a say in the logits; these are compared before anything is timed.
Each contender is a process of its own with all cores, and only the one whose turn it is runs.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import report, turns
from benchmarks.inputs import write_inputs
from benchmarks.turns import ROOT, Contender
from poolformer_jax import PoolFormerConfig
from poolformer_jax.published import RESULTS

# Float32 logits of deep networks, summed in other orders: the largest differences seen are 2e-6 (s12) and 1e-5 (m36).
TOLERANCE = 1e-4
NAME = "cpu-inference"
EXAMPLE = "example:\n  python -m benchmarks cpu-inference --variants s12 --batches 1 --rounds 3"


def main(arguments: Sequence[str]) -> int:
    """Runs the benchmark, prints its tables, writes JSON, and returns the exit code."""
    options = _parser().parse_args(arguments)
    console = Console()
    machine, contests = report.machine(), []
    for variant in options.variants:
        for batch in options.batches:
            with tempfile.TemporaryDirectory(prefix="cpu-inference-") as name, console.status("") as status:
                folder = Path(name)
                status.update(f"{variant}, batch {batch}: writing the weights, and their ONNX file")
                write_inputs(folder, PoolFormerConfig.from_variant(variant), batch)
                export_onnx(folder)
                status.update(f"{variant}, batch {batch}")
                contest = report.contest(contenders(folder), batch, options, TOLERANCE, status)
            report.show(console, f"{variant}, batch {batch}, float32, {machine['cores']} cores", contest)
            contests.append({"variant": variant, "batch": batch, **contest})
            # After each, because the next one may take long.
            report.write(options.json, NAME, arguments, {"machine": machine, "contests": contests}, console)
    return 0


def contenders(folder: Path) -> list[Contender]:
    """Ours first: the others' logits are compared with it."""
    where = {"folder": str(folder)}
    torch, onnx = "benchmarks.peers.pytorch:inference", "benchmarks.peers.onnx_runtimes"
    last = {"channels_last": True}
    return [
        Contender("ours", "benchmarks.peers.ours:inference", where, ours=True, environment={"JAX_PLATFORMS": "cpu"}),
        Contender("PyTorch", torch, where),
        Contender("PyTorch, channels_last", torch, where | last),
        Contender("torch.compile", torch, where | {"compiled": True}),
        Contender("torch.compile, channels_last", torch, where | {"compiled": True} | last),
        Contender("ONNX Runtime", f"{onnx}:onnx_runtime", where),
        Contender("OpenVINO", f"{onnx}:openvino", where),
    ]


def export_onnx(folder: Path) -> None:
    """Has PyTorch write model.onnx in a process of its own. If it cannot, those that need the file say so."""
    code = "import sys; from benchmarks.peers.pytorch import export_onnx; export_onnx(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True)


def _parser() -> argparse.ArgumentParser:
    parser = report.parser(NAME, __doc__, EXAMPLE)
    parser.add_argument("--variants", nargs="+", choices=RESULTS, default=["s12", "m36"], help="default: s12 m36")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16], help="images in a call (default: 1 16)")
    turns.add_flags(parser, rounds=9, seconds=1.0)
    return parser

"""Inference on the CPU beside PyTorch, ONNX Runtime and OpenVINO: the same weights, the same pixels, all cores.

Ours is the folded network that ImageClassifier compiles, from normalised pixels to logits: a batch shared by as many
CPU devices as there are cores (JAX_NUM_CPU_DEVICES), one image computed by one device with all cores. PyTorch runs
transformers' PoolFormer: eager, with channels_last, and through torch.compile with either layout. ONNX Runtime and
OpenVINO run the file that torch.onnx (its default exporter) makes of that same model, at a fixed batch, and the file
that `python -m poolformer_jax export` writes of ours. Everything is float32.

Weights are random, and such that every branch has a say in the logits; these are compared before anything is timed.
Each contender is a process of its own with all cores, and only the one whose turn it is runs.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import command_line, report
from benchmarks.contest import hold_contest
from benchmarks.inputs import write_inputs
from benchmarks.turns import ROOT, Contender
from poolformer_jax import PoolFormerConfig
from poolformer_jax.files import write_json
from poolformer_jax.network.variants import RESULTS

# Float32 logits of deep networks, summed in other orders: the largest differences seen are 2e-6 (s12) and 1e-5 (m36).
TOLERANCE = 1e-4


def main(arguments: Sequence[str]) -> int:
    """Runs the benchmark, prints its tables, writes JSON, and returns the exit code."""
    options = command_line.parse(_parser(), arguments)
    console, machine, contests = Console(), report.machine(), []
    for variant, batch in itertools.product(options.variants, options.batches):
        title = f"{variant}, batch {batch}, float32, {machine['cores']} cores"
        with tempfile.TemporaryDirectory(prefix="cpu-inference-") as name:
            folder = Path(name)
            with console.status(f"{title}: writing the weights, and their ONNX files"):
                write_inputs(folder, PoolFormerConfig.from_variant(variant), batch)
                export_onnx(folder)
            found = hold_contest(console, title, contenders(folder), options, images=batch, tolerance=TOLERANCE)
        contests.append({"variant": variant, "batch": batch} | found)
        # After each, because the next one may take long.
        write_json(options.json, {"command": options.command, "machine": machine, "contests": contests})
    console.print(f"written to {options.json}", soft_wrap=True)
    return 0


def contenders(folder: Path) -> list[Contender]:
    """Ours first: the others' logits are compared with it."""
    where = {"folder": str(folder)}
    torch, onnx = "benchmarks.peers.pytorch:inference", "benchmarks.peers.onnx_runtimes"
    last, exported = {"channels_last": True}, where | {"ours": True}
    return [
        Contender("ours", "benchmarks.peers.ours:inference", where, ours=True, environment={"JAX_PLATFORMS": "cpu"}),
        Contender("ours, exported, in ONNX Runtime", f"{onnx}:onnx_runtime", exported, ours=True),
        Contender("ours, exported, in OpenVINO", f"{onnx}:openvino", exported, ours=True),
        Contender("PyTorch", torch, where),
        Contender("PyTorch, channels_last", torch, where | last),
        Contender("torch.compile", torch, where | {"compiled": True}),
        Contender("torch.compile, channels_last", torch, where | {"compiled": True} | last),
        Contender("ONNX Runtime", f"{onnx}:onnx_runtime", where),
        Contender("OpenVINO", f"{onnx}:openvino", where),
    ]


def export_onnx(folder: Path) -> None:
    """Has PyTorch write model.onnx and us ours.onnx, in other processes. If one cannot, who needs the file says so."""
    code = "import sys; from benchmarks.peers.pytorch import export_onnx; export_onnx(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True)
    export = ["-m", "poolformer_jax", "export", str(folder), str(folder / "ours.onnx")]
    subprocess.run([sys.executable, *export], cwd=ROOT, capture_output=True)


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser("cpu-inference", __doc__, example="--variants s12 --batches 1 --rounds 3")
    parser.add_argument("--variants", nargs="+", choices=RESULTS, default=["s12", "m36"], help="default: s12 m36")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16], help="images in a call (default: 1 16)")
    command_line.add_turns(parser, rounds=9, seconds=1.0)
    return parser

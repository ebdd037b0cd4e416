"""A training step on the CPU beside PyTorch: forward, backward and AdamW's update, on all cores, in float32.

Ours is the step that `python -m train` compiles, without augmentation, drop path and learning-rate schedule. PyTorch
trains transformers' PoolFormer with AdamW's fused update: eager, with channels_last, and through torch.compile with
either layout. Weights, images, labels and hyperparameters are the same, and the losses of the first steps are compared
before anything is timed.

Each contender is a process of its own with all cores, and only the one whose turn it is runs.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import report, turns
from benchmarks.inputs import write_inputs
from benchmarks.turns import Contender
from poolformer_jax import PoolFormerConfig
from poolformer_jax.published import RESULTS

STEPS = 3
"""Whose losses are compared: the first tests the forward pass, the others the gradient and the update."""

ADAMW = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.05}
# Adam divides every gradient by its own size, and so makes rounding errors of small gradients visible.
TOLERANCE = 1e-3
NAME = "cpu-training"
EXAMPLE = "example:\n  python -m benchmarks cpu-training --variant s12 --batch 4 --rounds 3"


def main(arguments: Sequence[str]) -> int:
    """Runs the benchmark, prints its table, writes JSON, and returns the exit code."""
    options = _parser().parse_args(arguments)
    console = Console()
    machine = report.machine()
    with tempfile.TemporaryDirectory(prefix="cpu-training-") as folder, console.status("") as status:
        status.update("writing the weights")
        write_inputs(Path(folder), PoolFormerConfig.from_variant(options.variant), options.batch)
        status.update(f"{options.variant}, batch {options.batch}")
        contest = report.contest(contenders(Path(folder)), options.batch, options, TOLERANCE, status)
    title = f"training step, {options.variant}, batch {options.batch}, float32, {machine['cores']} cores"
    report.show(console, title, contest)
    contests = [{"variant": options.variant, "batch": options.batch, **contest}]
    report.write(options.json, NAME, arguments, {"machine": machine, "contests": contests}, console)
    return 0


def contenders(folder: Path) -> list[Contender]:
    """Ours first: the others' losses are compared with its."""
    where = {"folder": str(folder), "adamw": ADAMW, "steps": STEPS}
    torch, last = "benchmarks.peers.pytorch:training", {"channels_last": True}
    return [
        Contender("ours", "benchmarks.peers.ours:training", where, ours=True, environment={"JAX_PLATFORMS": "cpu"}),
        Contender("PyTorch", torch, where),
        Contender("PyTorch, channels_last", torch, where | last),
        Contender("torch.compile", torch, where | {"compiled": True}),
        Contender("torch.compile, channels_last", torch, where | {"compiled": True} | last),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = report.parser(NAME, __doc__, EXAMPLE)
    parser.add_argument("--variant", choices=RESULTS, default="s12", help="default: s12")
    parser.add_argument("--batch", type=int, default=16, help="images in a step (default: 16)")
    turns.add_flags(parser, rounds=7, seconds=1.0)
    return parser

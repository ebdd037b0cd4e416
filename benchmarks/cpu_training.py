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

from benchmarks import command_line, report
from benchmarks.contest import hold_contest
from benchmarks.inputs import write_inputs
from benchmarks.turns import Contender
from poolformer_jax import PoolFormerConfig
from poolformer_jax.files import write_json
from poolformer_jax.network.variants import RESULTS

STEPS = 3
"""Whose losses are compared: the first tests the forward pass, the others the gradient and the update."""

ADAMW = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.05}
# Adam divides every gradient by its own size, and so makes rounding errors of small gradients visible.
TOLERANCE = 1e-3


def main(arguments: Sequence[str]) -> int:
    """Runs the benchmark, prints its table, writes JSON, and returns the exit code."""
    options = command_line.parse(_parser(), arguments)
    console, machine = Console(), report.machine()
    title = f"training step, {options.variant}, batch {options.batch}, float32, {machine['cores']} cores"
    with tempfile.TemporaryDirectory(prefix="cpu-training-") as name:
        folder = Path(name)
        with console.status(f"{title}: writing the weights"):
            write_inputs(folder, PoolFormerConfig.from_variant(options.variant), options.batch)
        found = hold_contest(console, title, contenders(folder), options, images=options.batch, tolerance=TOLERANCE)
    contest = {"variant": options.variant, "batch": options.batch} | found
    write_json(options.json, {"command": options.command, "machine": machine, "contests": [contest]})
    console.print(f"written to {options.json}", soft_wrap=True)
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
    parser = command_line.parser("cpu-training", __doc__, example="--variant s12 --batch 4 --rounds 3")
    parser.add_argument("--variant", choices=RESULTS, default="s12", help="default: s12")
    parser.add_argument("--batch", type=int, default=16, help="images in a step (default: 16)")
    command_line.add_turns(parser, rounds=7, seconds=1.0)
    return parser

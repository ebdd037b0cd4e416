"""A training step on the CPU compared with PyTorch: forward, backward and AdamW's update, all cores, float32.

ours: the step that `python -m train` compiles, without augmentation, drop path and learning-rate schedule. PyTorch:
transformers' PoolFormer, or timm's network of the second paper, with the fused AdamW, eager and torch.compile, with and
without channels_last. Weights, images, labels and hyperparameters are the same. The losses of the first steps are
compared before anything is timed.

Each implementation runs in its own process on all cores, one at a time.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import command_line, report
from benchmarks.comparison import Implementation, compare
from benchmarks.inputs import LIBRARY_OF, write_inputs
from poolformer_jax import PoolFormerConfig
from poolformer_jax.files import write_json

STEPS = 3
"""Steps whose losses are compared: the first checks the forward pass, the others the gradient and the update."""

ADAMW = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.05}
# Adam divides each gradient by its own magnitude, which amplifies the rounding errors of small gradients.
TOLERANCE = 1e-3


def main(arguments: Sequence[str]) -> int:
    """Runs the benchmark, prints its table, writes JSON, and returns the exit code."""
    options = command_line.parse(_parser(), arguments)
    console, machine = report.create_console(), report.machine()
    library = LIBRARY_OF[options.variant]
    title = f"training step, {options.variant}, batch {options.batch}, float32, {machine['cores']} cores"
    with tempfile.TemporaryDirectory(prefix="cpu-training-") as name:
        folder = Path(name)
        with console.status(f"{title}: writing the weights"):
            write_inputs(folder, PoolFormerConfig.from_variant(options.variant), options.batch, library)
        compared = implementations(folder, library)
        found = compare(console, title, compared, options, images=options.batch, tolerance=TOLERANCE)
    contest = {"variant": options.variant, "batch": options.batch} | found
    write_json(options.json, {"command": options.command, "machine": machine, "contests": [contest]})
    console.print(f"written to {options.json}", soft_wrap=True)
    return 0


def implementations(folder: Path, library: str = "transformers") -> list[Implementation]:
    """Ours first: the losses of the others are compared with ours."""
    inputs = {"folder": str(folder), "adamw": ADAMW, "steps": STEPS}
    eager, compiled = inputs | {"library": library}, {"compiled": True}
    torch, last, cpu = "benchmarks.peers.pytorch:training", {"channels_last": True}, {"JAX_PLATFORMS": "cpu"}
    return [
        Implementation("ours", "benchmarks.peers.ours:training", inputs, ours=True, environment=cpu),
        Implementation("PyTorch", torch, eager),
        Implementation("PyTorch, channels_last", torch, eager | last),
        Implementation("torch.compile", torch, eager | compiled),
        Implementation("torch.compile, channels_last", torch, eager | compiled | last),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = command_line.make_parser("cpu-training", __doc__, example="--variant s12 --batch 4 --rounds 3")
    command_line.add_variants(parser, LIBRARY_OF, "s12")
    parser.add_argument("--batch", type=int, metavar="N", default=16, help="images per step (default: 16)")
    command_line.add_turns(parser, rounds=7, seconds=1.0)
    return parser

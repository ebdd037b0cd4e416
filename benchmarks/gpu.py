"""Inference and training on one NVIDIA GPU beside transformers and timm: bfloat16, a batch of 256, s12 and m36.

It has not been run on a GPU yet: no figure of this project comes from it.

The peers run through torch.compile, with channels_last and under autocast, their fastest ordinary way. Ours is the
network of ImageClassifier, and the step of `python -m train`, without augmentation. Weights and images are the
same; logits and losses are compared first, except timm's: it averages before the last norm, and has other logits.

MFU is the share of the GPU's dense bfloat16 peak: two operations for each multiplication that summary.count_macs
counts, three times as many in training. Bandwidth is what our program's kernels read and write by its text, an upper
estimate (`gpu-compiler`), by time.
Needs a jax and a torch that see the GPU: pip install -e '.[bench,cuda13]' timm
"""

import argparse
import itertools
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks import command_line, report
from benchmarks.contest import hold_contest
from benchmarks.cpu_training import ADAMW, STEPS
from benchmarks.inputs import write_inputs, write_timm_weights
from benchmarks.turns import Contender
from poolformer_jax import PoolFormerConfig
from poolformer_jax.files import write_json
from poolformer_jax.inference.cost_operations import count_macs
from poolformer_jax.network.variants import RESULTS

# bfloat16 keeps 8 bits, and autocast rounds in other places than we do.
TOLERANCE = 5e-2
WORK = ("inference", "training")


class Peak(NamedTuple):
    """What a GPU can do at most, dense bfloat16 with float32 sums: operations and bytes a second."""

    flops: float
    bandwidth: float


# NVIDIA's data sheets, by the name that nvidia-smi gives.
PEAKS = {
    "NVIDIA H200": Peak(989e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": Peak(989e12, 3.35e12),
    "NVIDIA H100 PCIe": Peak(756e12, 2.0e12),
    "NVIDIA A100-SXM4-80GB": Peak(312e12, 2.039e12),
    "NVIDIA A100-SXM4-40GB": Peak(312e12, 1.555e12),
    "NVIDIA L40S": Peak(362e12, 0.864e12),
    "NVIDIA L4": Peak(121e12, 0.3e12),
}


def main(arguments: Sequence[str]) -> int:
    """Runs the benchmark, prints its tables, writes JSON, and returns the exit code."""
    options = command_line.parse(_parser(), arguments)
    device = device_name()
    console, machine, contests = Console(), report.machine() | {"gpu": device}, []
    for variant, work in itertools.product(options.variants, options.work):
        config, batch = PoolFormerConfig.from_variant(variant), options.batch
        title = f"{work}, {variant}, batch {batch}, bfloat16, {device}"
        with tempfile.TemporaryDirectory(prefix="gpu-") as name:
            folder = Path(name)
            with console.status(f"{title}: writing the weights"):
                write_inputs(folder, config, batch)
                write_timm_weights(folder, config)
            found = hold_contest(console, title, contenders(folder, work), options, images=batch, tolerance=TOLERANCE)
        flops = batch * 2 * count_macs(config) * (3 if work == "training" else 1)
        found["results"] = [summary | use(summary, flops, PEAKS.get(device)) for summary in found["results"]]
        console.print(use_table(found["results"]))
        contests.append({"variant": variant, "work": work, "batch": batch} | found)
        write_json(options.json, {"command": options.command, "machine": machine, "contests": contests})
    console.print(f"written to {options.json}", soft_wrap=True)
    return 0


def device_name() -> str:
    """What nvidia-smi calls the first GPU.

    Raises:
        ValueError: if there is none.
    """
    if shutil.which("nvidia-smi") is None:
        raise ValueError("There is no NVIDIA GPU here (no nvidia-smi). Expected one; cpu-inference needs none.")
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True)
    if answer.returncode or not answer.stdout.strip():
        raise ValueError(f"nvidia-smi finds no GPU: {(answer.stderr or answer.stdout).strip()}. Expected one.")
    return answer.stdout.splitlines()[0].strip()


def contenders(folder: Path, work: str) -> list[Contender]:
    """Ours first: the others are compared with it."""
    where: dict[str, Any] = {"folder": str(folder)}
    if work == "training":
        where |= {"adamw": ADAMW, "steps": STEPS}
    torch = where | {"compiled": True, "channels_last": True, "device": "cuda", "autocast": True}
    # Without preallocation, which would leave nothing for the others' processes.
    environment = {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    peer = f"benchmarks.peers.pytorch:{work}"
    return [
        Contender("ours", f"benchmarks.peers.ours:{work}", where | {"dtype": "bfloat16"}, True, True, environment),
        Contender("transformers, torch.compile", peer, torch),
        Contender("timm, torch.compile", peer, torch | {"home": "timm"}, comparable=False),
    ]


def use(summary: Mapping[str, Any], flops: float, peak: Peak | None) -> dict[str, float | None]:
    """How well the GPU was used.

    Args:
        summary: of a contender.
        flops: of one call.
        peak: of the GPU; None if it is not listed here.

    Returns:
        `mfu`, a share of the peak; `bandwidth` in bytes a second and its share, where the program's bytes are known.
    """
    seconds = statistics.median(summary["seconds"])
    accessed = summary["facts"].get("bytes_accessed")
    bandwidth = accessed / seconds if accessed else None
    return {
        "mfu": flops / seconds / peak.flops if peak else None,
        "bandwidth": bandwidth,
        "bandwidth_share": bandwidth / peak.bandwidth if bandwidth and peak else None,
    }


def use_table(summaries: Sequence[Mapping[str, Any]]) -> Table:
    """Images a second and what `use` found."""
    made = Table("", "images a second", "MFU", "bandwidth")
    for summary in summaries:
        bandwidth = f"{summary['bandwidth'] / 1e12:.2f} TB/s" if summary["bandwidth"] else ""
        share = f" ({summary['bandwidth_share']:.0%})" if summary["bandwidth_share"] else ""
        mfu = f"{summary['mfu']:.0%}" if summary["mfu"] else ""
        rate = 1000 / summary["milliseconds_per_image"]
        made.add_row(summary["name"], f"{rate:,.0f}", mfu, bandwidth + share)
    return made


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser("gpu", __doc__, example="--variants s12 --batch 128 --work inference")
    parser.add_argument("--variants", nargs="+", choices=RESULTS, default=["s12", "m36"], help="default: s12 m36")
    parser.add_argument("--work", nargs="+", choices=WORK, default=[*WORK], help="default: both")
    parser.add_argument("--batch", type=int, default=256, help="images in a call (default: 256)")
    command_line.add_turns(parser, rounds=9, seconds=2.0)
    return parser

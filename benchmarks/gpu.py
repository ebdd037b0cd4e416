"""Inference and training on one NVIDIA GPU compared with transformers and timm: bfloat16, batch 256, s12 and m36.

transformers and timm run with torch.compile, channels_last and autocast. ours: the network of ImageClassifier, and the
step of `python -m train` without augmentation. Weights and images are the same. Logits and losses are compared first,
except timm's: timm averages before the last norm, so its logits differ.

MFU is the share of the GPU's dense bfloat16 peak, with two operations per multiply-accumulate of the network, and three
times as many in training. Bandwidth is the bytes that the kernels of our compiled program read and write (an upper
estimate, see `gpu-compiler`) divided by the time.

Needs a jax and a torch that see the GPU:
  pip install -e '.[bench,cuda13]' timm
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

from rich.table import Table

from benchmarks import command_line, report
from benchmarks.comparison import Implementation, compare
from benchmarks.cpu_training import ADAMW, STEPS
from benchmarks.inputs import write_inputs, write_timm_weights
from poolformer_jax import PoolFormerConfig
from poolformer_jax.errors import InputError
from poolformer_jax.files import write_json
from poolformer_jax.inference import count_macs
from poolformer_jax.network import SIZES

# bfloat16 has 8 significant bits, and autocast rounds in other places than we do.
TOLERANCE = 5e-2
# A training program does not wait for every step, so a call of training is several.
STEPS_PER_CALL = {"inference": 1, "training": 5}
WORK = tuple(STEPS_PER_CALL)
PEERS = ("transformers", "timm")


class Peak(NamedTuple):
    """Peak rates of a GPU: dense bfloat16 operations with float32 sums, and bytes, per second."""

    flops: float
    bandwidth: float


# From NVIDIA's data sheets. The names are those that nvidia-smi prints.
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
    console, machine, contests = report.create_console(), report.machine() | {"gpu": device}, []
    for variant, work in itertools.product(options.variants, options.work):
        config, batch = PoolFormerConfig.from_variant(variant), options.batch
        title = f"{work}, {variant}, batch {batch}, bfloat16, {device}"
        with tempfile.TemporaryDirectory(prefix="gpu-") as name:
            folder = Path(name)
            with console.status(f"{title}: writing the weights"):
                write_inputs(folder, config, batch)
                write_timm_weights(folder, config)
            compared = implementations(folder, work, options.peers)
            steps = STEPS_PER_CALL[work]
            found = compare(console, title, compared, options, images=batch * steps, tolerance=TOLERANCE)
        flops = batch * 2 * count_macs(config) * (3 if work == "training" else 1)
        peak = PEAKS.get(device)
        found["results"] = [summary | utilization(summary, steps, flops, peak) for summary in found["results"]]
        console.print(utilization_table(found["results"]))
        contests.append({"variant": variant, "work": work, "batch": batch, "steps_per_call": steps} | found)
        write_json(options.json, {"command": options.command, "machine": machine, "contests": contests})
    console.print(f"written to {options.json}", soft_wrap=True)
    return 0


def device_name() -> str:
    """The name that nvidia-smi prints for the first GPU. Raises InputError if there is no GPU."""
    if shutil.which("nvidia-smi") is None:
        raise InputError("No NVIDIA GPU found (no nvidia-smi). On a CPU run: python -m benchmarks cpu-inference")
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True)
    if answer.returncode or not answer.stdout.strip():
        raise InputError(f"nvidia-smi finds no GPU: {(answer.stderr or answer.stdout).strip()}")
    return answer.stdout.splitlines()[0].strip()


def implementations(folder: Path, work: str, peers: Sequence[str] = PEERS) -> list[Implementation]:
    """Ours first: the results of the others are compared with ours."""
    inputs: dict[str, Any] = {"folder": str(folder)}
    if work == "training":
        inputs |= {"adamw": ADAMW, "steps": STEPS, "steps_per_call": STEPS_PER_CALL[work]}
    torch = inputs | {"compiled": True, "channels_last": True, "device": "cuda", "autocast": True}
    # Preallocation would leave no memory for the other processes.
    environment = {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    bfloat16 = inputs | {"dtype": "bfloat16"}
    return [
        *(
            Implementation(
                name, f"benchmarks.peers.ours:{work}", bfloat16 | {"kernels": mode}, ours=True, environment=environment
            )
            for name, mode in (("ours", "auto"), ("ours, kernels off", "off"))
        ),
        *(
            Implementation(
                f"{library}, torch.compile",
                f"benchmarks.peers.pytorch:{work}",
                torch | {"library": library},
                comparable=library != "timm",
            )
            for library in peers
        ),
    ]


def utilization(summary: Mapping[str, Any], steps: int, flops: float, peak: Peak | None) -> dict[str, float | None]:
    """The share of the GPU's peak rates that an implementation reached.

    Returns:
        `mfu`, `bandwidth` in bytes per second, and `bandwidth_share`; None where unknown.
    """
    seconds = statistics.median(summary["seconds"]) / steps
    accessed = summary["facts"].get("bytes_accessed")
    bandwidth = accessed / seconds if accessed else None
    return {
        "mfu": flops / seconds / peak.flops if peak else None,
        "bandwidth": bandwidth,
        "bandwidth_share": bandwidth / peak.bandwidth if bandwidth and peak else None,
    }


def utilization_table(summaries: Sequence[Mapping[str, Any]]) -> Table:
    """Images per second, MFU and bandwidth."""
    made = report.table("", ("", "images/s", "MFU", "bandwidth"))
    for summary in summaries:
        bandwidth = f"{summary['bandwidth'] / 1e12:.2f} TB/s" if summary["bandwidth"] else ""
        share = f" ({summary['bandwidth_share']:.0%})" if summary["bandwidth_share"] else ""
        mfu = f"{summary['mfu']:.0%}" if summary["mfu"] else ""
        rate = 1000 / summary["milliseconds_per_image"]
        made.add_row(summary["name"], f"{rate:,.0f}", mfu, bandwidth + share)
    return made


def _parser() -> argparse.ArgumentParser:
    parser = command_line.make_parser("gpu", __doc__, example="--variants s12 --batch 128 --work inference")
    command_line.add_variants(parser, SIZES, ["s12", "m36"])
    command_line.add_choices(parser, "--work", WORK)
    command_line.add_choices(parser, "--peers", PEERS)
    parser.add_argument("--batch", type=int, metavar="N", default=256, help="images per call (default: 256)")
    command_line.add_turns(parser, rounds=9, seconds=2.0)
    return parser

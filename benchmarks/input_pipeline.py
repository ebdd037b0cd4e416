"""Images per core-second of our input pipeline, tf.data and a PyTorch DataLoader, on the same JPEG files.

Each pipeline runs in its own process with one worker (tf.data: one thread), pinned to one core. They take turns: while
one is measured the others are stopped (SIGSTOP). Batches that a pipeline prepared ahead are discarded before its turn
starts. The figure is images per second of processor time of the whole process group, user and system, so a busy machine
hardly changes it.

Two tasks: random-resized crop + flip, and the same + RandAugment (rand-m9-mstd0.5-inc1). Two sets of JPEGs, made from
the photographs in tests/images: ImageNet's usual sizes, and large photographs.
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from benchmarks import command_line, report
from benchmarks.comparison import ROOT
from poolformer_jax.errors import InputError, PoolFormerError
from poolformer_jax.files import write_json

PEERS = Path(__file__).parent / "input_peers"
BATCH = 32
AHEAD = 6
"""Batches discarded before a turn: more than any pipeline prepares ahead."""

COPIES = 63
"""Further hard links per file: thousands of examples, but only tens of files in the page cache."""

# Width and height in pixels. The first set are the most frequent sizes of ImageNet's training images.
SIZES = {
    "imagenet": [(500, 375), (375, 500), (500, 333), (500, 334), (500, 500), (333, 500), (500, 374), (400, 300)],
    "large": [(1600, 1200), (1200, 1600), (1920, 1280), (2048, 1536)],
}

LARGE_TURN = 4
"""Turns with large photographs, which take ten times as long, are shorter by this factor."""


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """One pipeline: its command, a note for the table, and further environment variables."""

    name: str
    command: list[str]
    note: str
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Result:
    """Images per core-second of a pipeline, one figure per round."""

    name: str
    note: str
    versions: dict[str, str]
    images_per_core_second: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.images_per_core_second)


def main(arguments: Sequence[str]) -> int:
    """Runs the benchmark, prints its tables, writes JSON, and returns the exit code."""
    options = command_line.parse(_parser(), arguments)
    if sys.platform != "linux" or shutil.which("taskset") is None:
        raise InputError("input-pipeline needs Linux and taskset: it pins processes and reads /proc.")
    console = report.create_console()
    found: dict[str, Any] = {"command": options.command, "machine": report.machine(), "batch": BATCH, "sets": {}}
    with tempfile.TemporaryDirectory(prefix="jpegs-") as folder:
        for name, sizes in SIZES.items():
            here = Path(folder) / name
            files = write_jpegs(here, sizes, options.images)
            batches = options.batches if name == "imagenet" else max(1, options.batches // LARGE_TURN)
            kilobytes = sum(file.stat().st_size for file in files) / 1e3 / len(files)
            described: dict[str, Any] = {"files": len(files), "kilobytes": round(kilobytes)}
            found["sets"][name] = described
            for randaugment in (False, True):
                results = measure(pipelines(here, randaugment, options), options.rounds, batches)
                key = "crop+flip+randaugment" if randaugment else "crop+flip"
                described[key] = [dataclasses.asdict(result) | {"median": result.median} for result in results]
                show(console, f"{name}, {described['kilobytes']} kB a file: {key}", results)
                write_json(options.json, found)  # after every table, because the rest takes minutes
    console.print(f"written to {options.json}", soft_wrap=True)
    return 0


def pipelines(folder: Path, randaugment: bool, options: argparse.Namespace) -> list[Pipeline]:
    """The pipelines for one task, ours first."""
    policy = "rand-m9-mstd0.5-inc1" if randaugment else "none"
    ours = [sys.executable, "-m", "benchmarks.input_peers.ours", "--source", f"folder:{folder}"]
    ours += ["--batch-size", str(BATCH), "--workers", "1", "--randaugment", policy, "--held-out", "0.01"]
    flag = ["--randaugment"] if randaugment else []
    torch = [sys.executable, str(PEERS / "pytorch_loader.py"), str(folder), str(BATCH), *flag]
    simd, pillow = [*ours, "--resizer", "simd"], [*ours, "--resizer", "pillow"]
    neither = "without nvImageCodec and cykooz-resizer"
    found = [
        Pipeline("ours", simd, "the default"),
        Pipeline("ours, Pillow alone", pillow, neither, hide_codec(folder.parent)),
        Pipeline("ours, exact", [*simd, "--no-scaled-decoding"], "every JPEG decoded at full size"),
        Pipeline("PyTorch, uint8", torch, "the same filters, uint8 as in timm's loader"),
        Pipeline("PyTorch, float32", [*torch, "--float"], "the same filters, normalised as in torchvision"),
    ]
    if folder.name == "imagenet":  # at these sizes scaled decoding never applies
        found = [pipeline for pipeline in found if pipeline.name != "ours, exact"]
    if not randaugment:
        alone = [*simd, "--workers", "0"]
        found.insert(1, Pipeline("ours, one process", alone, "one thread, no worker process, like tf.data"))
        # TensorFlow has no RandAugment.
        tensorflow = [options.tensorflow_python, str(PEERS / "tensorflow_data.py"), str(folder), str(BATCH)]
        found += [
            Pipeline("tf.data", tensorflow, "no antialiasing: a cheaper filter, other pixels"),
            Pipeline("tf.data, antialias", [*tensorflow, "--antialias"], "antialiased like Pillow's filters"),
            Pipeline("tf.data, own crops", [*tensorflow, "--own-crops"], "no antialiasing, and smaller crops"),
        ]
    return found


def hide_codec(folder: Path) -> dict[str, str]:
    """Environment variables that hide nvImageCodec behind an empty package."""
    empty = folder / "hidden" / "nvidia"
    empty.mkdir(parents=True, exist_ok=True)
    (empty / "__init__.py").touch()
    return {"PYTHONPATH": str(empty.parent)}


def measure(found: Sequence[Pipeline], rounds: int, batches: int) -> list[Result]:
    """Times the pipelines in turns. A pipeline that cannot start is left out, with the reason on stderr."""
    with ExitStack() as stack:
        running = []
        for pipeline in found:
            process = stack.enter_context(started(pipeline))
            versions = answer(process)
            if not versions:
                lines = errors(process).strip().splitlines()
                print(f"left out: {pipeline.name} ({lines[-1] if lines else 'it did not start'})", file=sys.stderr)
                continue
            running.append((process, Result(pipeline.name, pipeline.note, json.loads(versions))))
            os.killpg(process.pid, signal.SIGSTOP)
        for _ in range(rounds):
            for process, result in running:
                os.killpg(process.pid, signal.SIGCONT)
                request(process, AHEAD)
                before = core_seconds(process.pid)
                request(process, batches)
                seconds = core_seconds(process.pid) - before
                os.killpg(process.pid, signal.SIGSTOP)
                result.images_per_core_second.append(batches * BATCH / seconds)
        return [result for _, result in running]


@contextmanager
def started(pipeline: Pipeline) -> Iterator[subprocess.Popen[str]]:
    """The pipeline's process, in a new process group on one core."""
    core = max(os.sched_getaffinity(0))
    process = subprocess.Popen(
        ["taskset", "--cpu-list", str(core), *pipeline.command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu", **pipeline.environment},
    )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def request(process: subprocess.Popen[str], batches: int) -> None:
    """Has the pipeline make `batches` batches, and waits for them."""
    assert process.stdin is not None
    process.stdin.write(f"{batches}\n")
    process.stdin.flush()
    if answer(process) != "done\n":
        raise PoolFormerError(f"A pipeline failed:\n{errors(process)}")


def answer(process: subprocess.Popen[str]) -> str:
    """The next line of the pipeline's output; "" if it has ended."""
    assert process.stdout is not None
    return process.stdout.readline()


def errors(process: subprocess.Popen[str]) -> str:
    """All that a pipeline that has ended wrote on stderr."""
    assert process.stderr is not None
    return process.stderr.read()


def core_seconds(group: int) -> float:
    """User and system time of all processes of a session, in seconds."""
    ticks = 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # the process has just ended
            continue
        if int(fields[3]) == group:  # session
            ticks += int(fields[11]) + int(fields[12])  # utime, stime
    return ticks / os.sysconf("SC_CLK_TCK")


def write_jpegs(folder: Path, sizes: Sequence[tuple[int, int]], count: int) -> list[Path]:
    """Writes JPEG files of two classes: enlarged parts of photographs with added noise.

    Noise and quality give files of ImageNet's average size, 110 kB, so that decoding costs the same.
    """
    rng = np.random.default_rng(0)
    photographs = []
    for name in ("astronaut.jpg", "coffee.jpg", "chelsea.jpg", "rocket.jpg"):
        with Image.open(ROOT / "tests" / "images" / name) as image:
            photographs.append(image.convert("RGB"))
    files = []
    for number in range(count):
        width, height = sizes[number % len(sizes)]
        photograph = photographs[number % len(photographs)]
        share = rng.uniform(0.6, 1.0)
        part_width, part_height = int(photograph.width * share), int(photograph.height * share)
        left = int(rng.integers(photograph.width - part_width + 1))
        top = int(rng.integers(photograph.height - part_height + 1))
        part = photograph.crop((left, top, left + part_width, top + part_height))
        pixels = np.asarray(part.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        noisy = np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
        path = folder / f"class_{number // len(sizes) % 2}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(path, quality=95)
        files.append(path)
        for copy in range(COPIES):
            os.link(path, path.with_name(f"{number:04d}-{copy}.jpg"))
    return files


def show(console: Console, title: str, results: Sequence[Result]) -> None:
    """Prints a table; its last column is the speed of the first row relative to each row."""
    table = report.table(title, ("", "images/core-second", "range", "speedup of ours"))
    for result in results:
        values = result.images_per_core_second
        spread = f"{min(values):.0f} to {max(values):.0f}"
        ratio = statistics.median(a / b for a, b in zip(results[0].images_per_core_second, values))
        table.add_row(result.name, f"{result.median:.0f}", spread, f"{ratio:.2f}x")
    console.print(table)
    for result in results:
        console.print(f"  {result.name}: {result.note}", highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = command_line.make_parser("input-pipeline", __doc__, example="--rounds 3 --images 16")
    parser.add_argument("--tensorflow-python", metavar="FILE", default=sys.executable, help="Python with tensorflow")
    parser.add_argument("--rounds", type=int, metavar="N", default=7, help="turns of each pipeline (default: 7)")
    parser.add_argument(
        "--batches", type=int, metavar="N", default=16, help=f"batches of {BATCH} per turn (default: 16)"
    )
    parser.add_argument("--images", type=int, metavar="N", default=64, help="different JPEGs per set (default: 64)")
    return parser

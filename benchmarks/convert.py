"""Time and memory of converting weights.

Each conversion runs `python -m convert SOURCE DESTINATION` in a new process. The time includes imports and hashing; the
memory is the peak resident set that the operating system reports. The weights are random.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import flax
import jax
import numpy as np
from rich.console import Console

import poolformer_jax
from benchmarks import command_line, report
from poolformer_jax import PoolFormerConfig
from poolformer_jax.errors import PoolFormerError
from poolformer_jax.files import write_json
from poolformer_jax.network import SIZES
from poolformer_jax.weights import LAYOUTS, leaves, write_safetensors, write_torch


@dataclass(frozen=True)
class Measurement:
    """Conversions of one file."""

    source: str  # layout and container of the file
    to: str  # layout of the folder
    file_bytes: int
    seconds: tuple[float, ...]  # time of each run
    processor_seconds: tuple[float, ...]  # processor time of each run, which other programs on the machine affect less
    peak_bytes: int  # largest resident set of all runs
    import_seconds: float  # time of a run that only imports and prints its help


def random_arrays(shapes: Sequence[tuple[int, ...]]) -> Iterator[np.ndarray]:
    """Normally distributed float32 arrays."""
    rng = np.random.default_rng(0)
    for shape in shapes:
        yield rng.standard_normal(shape, np.float32)


def make_file(folder: Path, variant: str, layout: str) -> Path:
    """Writes a weights file of `layout`: in torch.save's format for sail and timm, safetensors for the others."""
    config = PoolFormerConfig.from_variant(variant)
    config = PoolFormerConfig.from_variant(variant, **LAYOUTS[layout].fixed_fields(config))
    names = [(leaf.name, leaf.stored_shape) for leaf in leaves(config, layout)]
    torch = layout in ("sail", "timm")
    path = folder / f"{layout}_{variant}{'.pth' if torch else '.safetensors'}"
    (write_torch if torch else write_safetensors)(path, names, random_arrays([shape for _, shape in names]))
    return path


def run(*arguments: str | Path) -> tuple[float, float, int]:
    """Seconds, seconds of processor time, and peak bytes of one run of `python -m convert`."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "convert", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise PoolFormerError(f"python -m convert {' '.join(map(str, arguments))} exited with {process.returncode}.")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def measure(path: Path, layout: str, to: str, runs: int) -> Measurement:
    """Converts one file several times, each into a new folder."""
    import_seconds = min(run("--help")[0] for _ in range(2))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        results = [run(path, Path(folder) / f"{number}", "--to", to) for number in range(runs)]
    seconds, processor, peaks = zip(*results)
    source = f"{layout}, {'torch.save' if path.suffix == '.pth' else 'safetensors'}"
    return Measurement(source, to, path.stat().st_size, seconds, processor, max(peaks), import_seconds)


def main(arguments: Sequence[str]) -> int:
    """Measures, prints a table, and writes JSON. Returns the exit code."""
    options = command_line.parse(_parser(), arguments)
    console, machine = report.create_console(), report.machine()
    with tempfile.TemporaryDirectory() as folder:
        measurements = _measure_all(Path(folder), options.variant, options.runs)
    _print(console, options.variant, measurements)
    found = {
        "command": options.command,
        "machine": machine,
        "versions": {module.__name__: module.__version__ for module in (poolformer_jax, jax, flax, np)},
        "variant": options.variant,
        "measurements": [asdict(one) for one in measurements],
    }
    write_json(options.json, found)
    console.print(f"written to {options.json}", soft_wrap=True)
    return 0


def _measure_all(folder: Path, variant: str, runs: int) -> list[Measurement]:
    found = []
    for layout, to in (("hf", "jax"), ("sail", "jax"), ("jax", "hf"), ("timm", "sail")):
        path = make_file(folder, variant, layout)
        found.append(measure(path, layout, to, runs))
        path.unlink()
    return found


def _print(console: Console, variant: str, measurements: list[Measurement]) -> None:
    headings = ("from", "to", "time", "processor", "imports", "memory", "per byte")
    table = report.table(f"python -m convert, {variant}", headings)
    for one in measurements:
        table.add_row(
            one.source,
            one.to,
            f"{statistics.median(one.seconds):.2f} s",
            f"{statistics.median(one.processor_seconds):.2f} s",
            f"{one.import_seconds:.2f} s",
            f"{one.peak_bytes / 1e6:.0f} MB",
            f"{one.peak_bytes / one.file_bytes:.2f}",
        )
    table.caption = "memory: peak of the process. per byte: memory / size of the file."
    console.print(table)


def _parser() -> argparse.ArgumentParser:
    parser = command_line.make_parser("convert", __doc__, example="--runs 5")
    command_line.add_variants(parser, SIZES, "m48")
    parser.add_argument("--runs", type=int, metavar="N", default=3, help="runs of each conversion (default: 3)")
    return parser

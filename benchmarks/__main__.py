"""`python -m benchmarks NAME`: imports the benchmark with that name and runs it.

A benchmark is a module with `main(arguments) -> exit code`. Only the requested one is imported, because each needs
other packages. Exit codes: 0 done, 1 failed (one message on stderr), 2 wrong usage, 130 interrupted.
"""

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from poolformer_jax.cli import HelpFormatter
from poolformer_jax.errors import MissingDependencyError, PoolFormerError
from poolformer_jax.process import run_program
from poolformer_jax.version import __version__


class Benchmark(NamedTuple):
    """The module of a benchmark, one line about it, and the extras that install what it needs."""

    module: str
    summary: str
    extras: str = "bench"


BENCHMARKS = {
    "cpu-inference": Benchmark("cpu_inference", "CPU inference compared with PyTorch, ONNX Runtime, OpenVINO"),
    "cpu-training": Benchmark("cpu_training", "CPU training steps compared with PyTorch"),
    "gpu": Benchmark("gpu", "GPU inference and training compared with PyTorch", "bench,cuda13"),
    "gpu-compiler": Benchmark(
        "gpu_compiler", "kernels and bytes of the program for a GPU; needs no GPU", "train,cuda12"
    ),
    "tpu": Benchmark("tpu", "cycles and memory of the program for a TPU; needs no TPU", "train,tpu"),
    "convert": Benchmark("convert", "time and memory of converting weights", "convert"),
    "input-pipeline": Benchmark("input_pipeline", "images per core-second compared with tf.data and PyTorch"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one benchmark and returns its exit code."""
    return run_program(partial(_run, *_parse(sys.argv[1:] if arguments is None else list(arguments))))


def _run(name: str, arguments: list[str]) -> int:
    try:
        module = importlib.import_module(f"benchmarks.{BENCHMARKS[name].module}")
        code: int = module.main(arguments)
    except ModuleNotFoundError as error:
        if isinstance(error, PoolFormerError) or error.name is None or error.name.startswith("benchmarks"):
            raise
        extras = BENCHMARKS[name].extras
        raise MissingDependencyError(
            f"{error.name} is not installed. Install it: pip install -e '.[{extras}]'"
        ) from error
    return code


def _parse(arguments: list[str]) -> tuple[str, list[str]]:
    """The benchmark's name, and the options that the benchmark parses."""
    width = max(map(len, BENCHMARKS))
    names = "\n".join(f"  {name:<{width}}  {benchmark.summary}" for name, benchmark in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        usage="python -m benchmarks NAME [options]",
        description="Compares this package with other libraries; prints a table and writes JSON.",
        epilog=f"benchmarks:\n{names}\n\nexample:\n  python -m benchmarks cpu-inference --variants s12 --batches 1\n\n"
        "Options of one benchmark: python -m benchmarks tpu --help\n\n"
        "Install: pip install -e '.[bench]'",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"poolformer-jax {__version__}")
    parser.add_argument("name", metavar="NAME", help="which benchmark")
    parsed = parser.parse_args(arguments[:1])
    if parsed.name not in BENCHMARKS:
        parser.error(f"there is no benchmark {parsed.name!r}. Expected one of: {', '.join(BENCHMARKS)}.")
    return parsed.name, arguments[1:]


if __name__ == "__main__":
    # SIGTERM raises SystemExit, so that the processes of the compared implementations end with this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())

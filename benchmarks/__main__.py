"""`python -m benchmarks NAME`: finds the benchmark of that name and runs it.

A benchmark is a module with `main(arguments) -> exit code`, and is imported only when it is asked for: each needs
other packages. Exit codes: 0 done, 1 failed (one message on stderr says why), 2 wrong usage, 130 interrupted.
"""

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence
from typing import NamedTuple

from poolformer_jax.process import interrupt_exit_code

DONE, FAILED, USAGE = 0, 1, 2


class Benchmark(NamedTuple):
    """Where a benchmark is, and what it tells in one line."""

    module: str
    summary: str


BENCHMARKS = {
    "cpu-inference": Benchmark("cpu_inference", "inference on a CPU beside PyTorch, ONNX Runtime, OpenVINO"),
    "cpu-training": Benchmark("cpu_training", "training steps on a CPU beside PyTorch"),
    "gpu": Benchmark("gpu", "inference and training on a GPU beside PyTorch"),
    "gpu-compiler": Benchmark("gpu_compiler", "what the GPU compiler makes of the network; needs no GPU"),
    "tpu": Benchmark("tpu", "what the TPU compiler says of a training step; needs no TPU"),
    "convert": Benchmark("convert", "time and memory of converting weights"),
    "exchange": Benchmark("exchange", "whether cores share a cache, which a virtual machine hides"),
    "input-pipeline": Benchmark("input_pipeline", "images a second per core beside tf.data and PyTorch"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one benchmark and returns its exit code."""
    name, rest = _parse(sys.argv[1:] if arguments is None else list(arguments))
    try:
        module = importlib.import_module(f"benchmarks.{BENCHMARKS[name].module}")
        code: int = module.main(rest)
    except KeyboardInterrupt:
        return interrupt_exit_code()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("benchmarks"):
            raise
        print(f"error: {error.name} is not installed. Needs: pip install -e '.[bench]'", file=sys.stderr)
        return FAILED
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    return code


def _parse(arguments: list[str]) -> tuple[str, list[str]]:
    """The benchmark's name and what is left for it; its own --help is its own."""
    width = max(map(len, BENCHMARKS))
    names = "\n".join(f"  {name:<{width}}  {benchmark.summary}" for name, benchmark in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        usage="python -m benchmarks NAME [options]",
        description="Measures this package beside its peers: a table, and JSON.",
        epilog=f"benchmarks:\n{names}\n\nexample:\n  python -m benchmarks cpu-inference --variants s12 --batches 1\n\n"
        "Every benchmark explains itself: python -m benchmarks tpu --help\n"
        "Needs: pip install -e '.[bench]'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="which benchmark")
    parsed = parser.parse_args(arguments[:1])
    if parsed.name not in BENCHMARKS:
        parser.error(f"there is no benchmark {parsed.name!r}. Expected one of: {', '.join(BENCHMARKS)}.")
    return parsed.name, arguments[1:]


if __name__ == "__main__":
    # As an exception, so that the processes of contenders end with this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())

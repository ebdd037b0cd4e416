"""Compares implementations of the same work: checks that their results agree, then times them in turns.

Each implementation runs in its own process, because the thread pools of two libraries in one process compete for the
cores. Only one runs at a time; the others are stopped (SIGSTOP), so that none of their threads spins. The turns are
short, so that a busy machine slows all implementations equally.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console

from benchmarks import report
from benchmarks.report import Result
from poolformer_jax.errors import PoolFormerError

ROOT = Path(__file__).parent.parent


class BenchmarkError(PoolFormerError):
    """An implementation cannot run, or implementations disagree."""


@dataclass(frozen=True)
class Implementation:
    """One way to do the work."""

    name: str
    factory: str  # `module:function`, which makes the `Workload`
    options: Mapping[str, Any]  # keyword arguments of the function
    ours: bool = False  # True if it is this package's
    comparable: bool = True  # False if it computes another function, like timm's head
    environment: Mapping[str, str] = field(default_factory=dict)  # environment variables of its process


class Runner(Protocol):
    """What `take_turns` times."""

    def turn(self, seconds: float) -> float:
        """Works for about `seconds`; returns the seconds that one call took."""


def compare(
    console: Console,
    title: str,
    implementations: Sequence[Implementation],
    options: argparse.Namespace,
    *,
    images: int,
    tolerance: float,
) -> dict[str, Any]:
    """Measures the implementations (`measure`), prints their table, and returns the entries of the JSON report.

    `tolerance` is the largest allowed difference between results, relative to the largest number.
    """
    with console.status(title) as status:
        results, left_out = measure(
            implementations,
            rounds=options.rounds,
            seconds=options.seconds,
            tolerance=tolerance,
            say=lambda what: status.update(f"{title}: {what}"),
        )
    summaries = report.summarise(results, images)
    report.show(console, title, summaries, left_out)
    return {"load_after": report.load(), "results": summaries, "left_out": left_out}


def measure(
    implementations: Sequence[Implementation],
    *,
    rounds: int,
    seconds: float,
    tolerance: float,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[list[Result], dict[str, str]]:
    """Starts the implementations, compares their results, and times them in turns.

    Any implementation but the first, ours, is left out if it cannot start. `say` is called with a line about the
    current activity.

    Returns:
        The results in the given order, and for each implementation that could not start the reason.

    Raises:
        BenchmarkError: if the first cannot start, or if results differ by more than the tolerance.
    """
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for implementation in implementations:
            say(f"starting {implementation.name}")
            try:
                workers[implementation.name] = stack.enter_context(started(implementation))
            except BenchmarkError as error:
                if implementation is implementations[0]:
                    raise
                left_out[implementation.name] = str(error)
        comparable = {name: worker.result for name, worker in workers.items() if worker.implementation.comparable}
        differences = check_agreement(comparable, tolerance)
        times = take_turns(workers, rounds=rounds, seconds=seconds, say=say)
    results = [
        Result(name, worker.implementation.ours, tuple(times[name]), differences.get(name), **worker.ready)
        for name, worker in workers.items()
    ]
    return results, left_out


def check_agreement(results: Mapping[str, np.ndarray], tolerance: float) -> dict[str, float]:
    """The largest difference of each result to the first, relative to the largest number of the first.

    Raises BenchmarkError if one is above the tolerance; the message lists them all.
    """
    first, *_ = results.values()
    if shapes := {name: result.shape for name, result in results.items() if result.shape != first.shape}:
        raise BenchmarkError(f"Expected results of shape {first.shape}. Got {shapes}.")
    differences = {name: float(np.abs(result - first).max() / np.abs(first).max()) for name, result in results.items()}
    if not all(difference <= tolerance for difference in differences.values()):  # NaN is a difference, too
        listed = ", ".join(f"{name} {difference:.1e}" for name, difference in differences.items())
        raise BenchmarkError(f"Results differ. Expected differences of at most {tolerance}. Got: {listed}.")
    return differences


def take_turns(
    runners: Mapping[str, Runner],
    *,
    rounds: int,
    seconds: float,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Seconds per call, by name and round. The order changes from round to round and is the same in every run."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    shuffled = random.Random(0)
    for number in range(rounds):
        for name in shuffled.sample(list(runners), len(runners)):
            say(f"round {number + 1} of {rounds}: {name}")
            times[name].append(runners[name].turn(seconds))
    return times


class Worker:
    """The process of an implementation, stopped between its turns."""

    def __init__(
        self,
        implementation: Implementation,
        process: subprocess.Popen[str],
        ready: dict[str, Any],
        result: np.ndarray,
    ) -> None:
        self.implementation, self.ready, self.result = implementation, ready, result
        assert process.stdin is not None and process.stdout is not None
        self._process, self._requests, self._answers = process, process.stdin, process.stdout
        self._signal("SIGSTOP")

    def turn(self, seconds: float) -> float:
        """As `Runner.turn`."""
        self._signal("SIGCONT")
        self._requests.write(f"{seconds}\n")
        self._requests.flush()
        if not (answer := self._answers.readline()):
            raise BenchmarkError(f"{self.implementation.name} ended during a turn.")
        self._signal("SIGSTOP")
        return float(answer)

    def _signal(self, name: str) -> None:
        if hasattr(signal, name):  # not on Windows
            os.kill(self._process.pid, getattr(signal, name))


@contextmanager
def started(implementation: Implementation) -> Iterator[Worker]:
    """The worker of an implementation, ready for its first turn.

    Raises BenchmarkError if it does not start; the message ends with the last line of its stderr.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        result, log = Path(folder) / "result.npy", Path(folder) / "log"
        arguments = [implementation.factory, json.dumps(implementation.options), str(result)]
        with log.open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env={**os.environ, **implementation.environment},
            )
        assert process.stdout is not None
        try:
            if not (ready := process.stdout.readline()):
                lines = log.read_text(errors="replace").strip().splitlines()
                raise BenchmarkError(_reason(lines[-1] if lines else "it did not start"))
            yield Worker(implementation, process, json.loads(ready), np.load(result))
        finally:
            process.kill()
            process.communicate()


def _reason(line: str) -> str:
    """The last line of a traceback as a reason, with the extra that installs a missing package."""
    reason = line.replace("ModuleNotFoundError: ", "")
    return f"{reason}; pip install -e '.[bench]'" if "No module named" in reason else reason

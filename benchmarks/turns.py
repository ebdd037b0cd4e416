"""Contenders take turns, each in a process of its own, so that what slows the machine down slows all of them down.

Thread pools of two libraries in one process take the cores from each other; here only the contender whose turn it is
runs, and the others are stopped (SIGSTOP), so that no idle thread spins beside it either.
"""

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

from benchmarks.cores import rates

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Contender:
    """One way to do the work.

    Args:
        name: in the tables.
        factory: `module:function`, which makes its `Job`.
        options: what the function is called with.
        ours: whether it is this package's.
        comparable: whether it computes the same function; False where it is known not to, as timm's head.
        environment: variables of its process.
    """

    name: str
    factory: str
    options: Mapping[str, Any]
    ours: bool = False
    comparable: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """How long a contender needed.

    Args:
        name: of the contender.
        ours: whether it is this package's.
        seconds: of one call, by round.
        difference: largest distance of its result to the first contender's, relative to the largest number there;
            None where they are not comparable.
        versions: of what did the work.
        threads: how many it computed with.
        facts: what its job told besides.
        share_a_cache: whether cores did just before each turn (`cores`); None where that cannot be told.
    """

    name: str
    ours: bool
    seconds: tuple[float, ...]
    difference: float | None
    versions: Mapping[str, str]
    threads: int
    facts: Mapping[str, Any]
    share_a_cache: tuple[bool | None, ...] = ()


class Runner(Protocol):
    """What can take a turn."""

    def turn(self, seconds: float) -> float:
        """Works for about so many seconds; returns how many of them one call took."""


class Unready(RuntimeError):
    """A contender that could not start."""


def measure(
    contenders: Sequence[Contender],
    *,
    rounds: int,
    seconds: float,
    tolerance: float,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[list[Result], dict[str, str]]:
    """Starts the contenders, compares what they compute, and lets them take turns.

    Args:
        contenders: ours first; the others are left out where they cannot start.
        rounds: turns of each.
        seconds: length of a turn; one call at least.
        tolerance: how far results may differ, relative to the largest number among them.
        say: told what is being done.

    Returns:
        The results, in the order given, and of those that could not start, why.

    Raises:
        ValueError: if two contenders compute different things, or none but ours could start.
        Unready: if the first could not start.
    """
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for contender in contenders:
            say(f"starting {contender.name}")
            try:
                workers[contender.name] = stack.enter_context(started(contender))
            except Unready as error:
                if contender is contenders[0]:
                    raise
                left_out[contender.name] = str(error)
        if all(worker.contender.ours for worker in workers.values()):
            reasons = "\n".join(f"  {name}: {reason}" for name, reason in left_out.items())
            raise ValueError(f"There is nothing to compare with. Expected one of these to start:\n{reasons}")
        comparable = {name: worker.result for name, worker in workers.items() if worker.contender.comparable}
        differences = compare(comparable, tolerance)
        together: dict[str, list[bool | None]] = {name: [] for name in workers}

        def look(name: str) -> None:
            found = rates()
            together[name].append(None if found is None else found.share_a_cache)

        seconds_of = take_turns(workers, rounds=rounds, seconds=seconds, say=say, before=look)
    results = [
        Result(
            name,
            worker.contender.ours,
            tuple(seconds_of[name]),
            differences.get(name),
            share_a_cache=tuple(together[name]),
            **worker.told,
        )
        for name, worker in workers.items()
    ]
    return results, left_out


def compare(results: Mapping[str, np.ndarray], tolerance: float) -> dict[str, float]:
    """How far each result is from the first, relative to the largest number in that.

    Raises:
        ValueError: if that is more than the tolerance, with all the differences.
    """
    first, *_ = results.values()
    if shapes := {name: result.shape for name, result in results.items() if result.shape != first.shape}:
        raise ValueError(f"Contenders return other shapes than {first.shape}: {shapes}.")
    differences = {name: float(np.abs(result - first).max() / np.abs(first).max()) for name, result in results.items()}
    if not all(difference <= tolerance for difference in differences.values()):  # NaN is no agreement either
        told = ", ".join(f"{name} {difference:.1e}" for name, difference in differences.items())
        raise ValueError(f"Contenders compute different things. Expected differences of at most {tolerance}: {told}.")
    return differences


def take_turns(
    runners: Mapping[str, Runner],
    *,
    rounds: int,
    seconds: float,
    say: Callable[[str], None] = lambda _: None,
    before: Callable[[str], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Seconds of one call, by name and round; each round in another order, the same ones every time.

    `before` is called with the name of whoever has the next turn.
    """
    found: dict[str, list[float]] = {name: [] for name in runners}
    shuffled = random.Random(0)
    for number in range(rounds):
        for name in shuffled.sample(list(runners), len(runners)):
            say(f"round {number + 1} of {rounds}: {name}")
            before(name)
            found[name].append(runners[name].turn(seconds))
    return found


class Worker:
    """A contender's process, stopped between its turns."""

    def __init__(self, contender: Contender, process: subprocess.Popen[str], ready: dict[str, Any], result: np.ndarray):
        self.contender, self.told, self.result = contender, ready, result
        self._process = process
        self._signal("SIGSTOP")

    def turn(self, seconds: float) -> float:
        """As `Runner.turn`."""
        self._signal("SIGCONT")
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        if not (answer := self._process.stdout.readline()):
            raise RuntimeError(f"{self.contender.name} ended in the middle of its turn.")
        self._signal("SIGSTOP")
        return float(answer)

    def _signal(self, name: str) -> None:
        if hasattr(signal, name):  # Windows has no such thing
            os.kill(self._process.pid, getattr(signal, name))


@contextmanager
def started(contender: Contender) -> Iterator[Worker]:
    """The contender's process, ready for its first turn.

    Raises:
        Unready: if it does not get ready, with the last line of what it wrote.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        result, log = Path(folder) / "result.npy", Path(folder) / "log"
        with log.open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", contender.factory, json.dumps(contender.options), result],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env={**os.environ, **contender.environment},
            )
        try:
            if not (ready := process.stdout.readline()):
                lines = log.read_text(errors="replace").strip().splitlines()
                raise Unready(f"{contender.name}: {lines[-1] if lines else 'it did not start'}")
            yield Worker(contender, process, json.loads(ready), np.load(result))
        finally:
            process.kill()
            process.communicate()

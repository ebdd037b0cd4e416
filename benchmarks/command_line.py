"""The flags that benchmarks share, where their figures go, and the command that repeats them."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path


def parser(name: str, description: str | None, example: str) -> argparse.ArgumentParser:
    """The flags' beginning, for a benchmark called `name`: its description above them, and an example below.

    Figures go where git does not look, so that trying a benchmark leaves the committed ones alone.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=description,
        epilog=f"example:\n  python -m benchmarks {name} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    path = Path("runs", "benchmarks", f"{name}.json")
    made.add_argument(
        "--json", type=Path, metavar="FILE", default=path, help=f"where to write the figures (default: {path})"
    )
    return made


def add_turns(flags: argparse.ArgumentParser, rounds: int, seconds: float) -> None:
    """How long the turns are, and how many."""
    flags.add_argument("--rounds", type=int, default=rounds, help=f"turns of every contender (default: {rounds})")
    flags.add_argument(
        "--seconds", type=float, default=seconds, help=f"length of a turn, a call at least (default: {seconds:g})"
    )


def parse(flags: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """The options, and as `command` the line that repeats them."""
    options = flags.parse_args(arguments)
    options.command = f"{flags.prog} {shlex.join(arguments)}".rstrip()
    return options

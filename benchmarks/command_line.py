"""The flags that benchmarks share, and the command line that a report records."""

import argparse
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from poolformer_jax.cli import HelpFormatter


def make_parser(name: str, description: str | None, example: str) -> argparse.ArgumentParser:
    """A parser for the benchmark `name`, with an example command and the flag `--json`.

    By default JSON goes to `runs/`, which git ignores, so trying a benchmark does not change the committed figures.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=description,
        epilog=f"example:\n  python -m benchmarks {name} {example}",
        formatter_class=HelpFormatter,
    )
    path = Path("runs", "benchmarks", f"{name}.json")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", default=path, help=f"where to write the figures (default: {path})"
    )
    return parser


def add_turns(parser: argparse.ArgumentParser, rounds: int, seconds: float) -> None:
    """Adds `--rounds` and `--seconds`."""
    parser.add_argument("--rounds", type=int, default=rounds, help=f"turns of each implementation (default: {rounds})")
    parser.add_argument(
        "--seconds", type=float, default=seconds, help=f"length of a turn; at least one call (default: {seconds:g})"
    )


def add_variants(parser: argparse.ArgumentParser, names: Iterable[str], default: str | list[str]) -> None:
    """Adds `--variant`, or `--variants` if the default is a list."""
    flag, nargs, shown, noun = "--variant", None, default, "published network"
    if isinstance(default, list):
        flag, nargs, shown, noun = "--variants", "+", " ".join(default), "published networks"
    explained = f"{noun}, such as s12 (default: {shown})"
    parser.add_argument(flag, nargs=nargs, choices=names, metavar="NAME", default=default, help=explained)


def add_choices(parser: argparse.ArgumentParser, flag: str, choices: Iterable[str]) -> None:
    """Adds a flag that takes some of `choices`; by default all."""
    names = list(choices)
    explained = f"{', '.join(names)} (default: all)"
    parser.add_argument(flag, nargs="+", choices=names, metavar="NAME", default=names, help=explained)


def add_compilation(parser: argparse.ArgumentParser) -> None:
    """Adds what to compile, and what to show of it."""
    parser.add_argument("--plain", action="store_true", help="compile the blocks as the paper writes them")
    parser.add_argument("--no-kernels", action="store_true", help="compile everything by XLA")
    parser.add_argument("--top", type=int, metavar="N", default=12, help="costly instructions to list (default: 12)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="also write the compiled programs to this file")


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """The options, and as `command` the line that repeats them."""
    options = parser.parse_args(arguments)
    options.command = f"{parser.prog} {shlex.join(arguments)}".rstrip()
    return options

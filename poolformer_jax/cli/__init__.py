"""The commands of `python -m poolformer_jax`, one module each.

A command module has NAME, HELP, EXAMPLE, `add_arguments(parser)` and `run(arguments) -> exit code`. Slow imports and
those of optional packages are in `run`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial

from poolformer_jax.cli import cam, demo, embed, export, predict, summary, variants, verify
from poolformer_jax.cli.arguments import (
    HelpFormatter as HelpFormatter,
    add_source_options as add_source_options,
    hub_options as hub_options,
)
from poolformer_jax.process import DONE, run_program
from poolformer_jax.version import __version__

COMMANDS = (predict, embed, variants, summary, cam, export, verify, demo)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 1 failed (with a message on stderr), 2 wrong usage."""
    return run_program(partial(_run, arguments))


def _run(arguments: Sequence[str] | None) -> int:
    try:
        parsed = _parser().parse_args(arguments)
        code: int = parsed.run(parsed)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has closed it, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m poolformer_jax",
        description="PoolFormer in JAX: classify and embed images, inspect a network, export it.",
        epilog="Help for one command: python -m poolformer_jax predict --help",
    )
    parser.add_argument("--version", action="version", version=f"poolformer-jax {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.NAME,
            help=command.HELP,
            description=command.HELP,
            epilog=f"example:\n{command.EXAMPLE}",
            formatter_class=HelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser

"""Arguments that several commands take, and the line that says what a command is waiting for."""

import argparse
import itertools
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from poolformer_jax.process import exit_on_interrupt

_LAST_PORT = 65535
DEFAULT_WEIGHTS = "sail/poolformer_s12"


def port(text: str) -> int:
    """A number that a port can have."""
    number = positive(text)
    if number > _LAST_PORT:
        raise argparse.ArgumentTypeError(f"{text} is no port: expected 1 to {_LAST_PORT}")
    return number


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Fills paragraphs to the terminal's width, and leaves indented lines, the examples, as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        for is_prose, group in itertools.groupby(text.splitlines(), lambda line: bool(line) and line[0] != " "):
            if is_prose:
                # Names of packages and flags are to be copied, so they stay in one piece.
                lines += textwrap.wrap(" ".join(group), width, break_on_hyphens=False, break_long_words=False)
            else:
                lines += group
        return "\n".join(indent + line for line in lines)


def add_weights(parser: argparse.ArgumentParser, *, positional: bool = False) -> None:
    """The weights to use, as `--weights` or as the positional SOURCE."""
    explained = "a name on the Hugging Face Hub, a model folder, or a weights file"
    if positional:
        parser.add_argument("source", metavar="SOURCE", help=explained)
    else:
        parser.add_argument(
            "--weights", metavar="SOURCE", default=DEFAULT_WEIGHTS, help=f"{explained} (default: %(default)s)"
        )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """The type feature maps are computed in."""
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="compute type (default: %(default)s)"
    )


def positive(text: str) -> int:
    """A whole number of at least 1; argparse turns the error into its usage message."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


@contextmanager
def waiting(message: str) -> Iterator[None]:
    """Says on the terminal what is being waited for, and takes it back; says nothing into files and pipes."""
    visible = sys.stderr.isatty()
    if visible:
        # A line that wraps could not be taken back.
        width = shutil.get_terminal_size().columns - len(" ...") - 1
        shown = message if len(message) <= width else f"{message[: width - 1]}…"
        print(f"{shown} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if visible:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@contextmanager
def starting_jax() -> Iterator[None]:
    """Around the imports of a command, which take a second or two."""
    with waiting("Starting JAX"), exit_on_interrupt():
        yield

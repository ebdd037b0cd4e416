"""Arguments that several commands have, and the message that is shown while a command waits."""

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
    """The number of a port."""
    number = positive(text)
    if number > _LAST_PORT:
        raise argparse.ArgumentTypeError(f"{text} is not a port: expected 1 to {_LAST_PORT}")
    return number


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Wraps paragraphs to the terminal's width, and keeps indented lines (examples) as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        for is_prose, group in itertools.groupby(text.splitlines(), lambda line: bool(line) and line[0] != " "):
            if is_prose:
                # Names of packages and flags stay in one piece, to be copied.
                lines += textwrap.wrap(" ".join(group), width, break_on_hyphens=False, break_long_words=False)
            else:
                lines += group
        return "\n".join(indent + line for line in lines)


def add_weights(parser: argparse.ArgumentParser, *, positional: bool = False) -> None:
    """Adds the weights, as `--weights` or as the positional SOURCE."""
    explained = "a name on the Hugging Face Hub, a model folder, or a weights file"
    if positional:
        parser.add_argument("source", metavar="SOURCE", help=explained)
    else:
        parser.add_argument(
            "--weights", metavar="SOURCE", default=DEFAULT_WEIGHTS, help=f"{explained} (default: %(default)s)"
        )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Adds the type that feature maps are computed in."""
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="compute type (default: %(default)s)"
    )


def positive(text: str) -> int:
    """A whole number of at least 1, as a `type` of argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


@contextmanager
def waiting(message: str) -> Iterator[None]:
    """Shows a message on the terminal until the block ends; prints nothing into files and pipes."""
    visible = sys.stderr.isatty()
    if visible:
        # A wrapped line could not be erased.
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
    """For the imports of a command, which take a second or two: shows a message, and exits on Ctrl-C."""
    with waiting("Starting JAX"), exit_on_interrupt():
        yield

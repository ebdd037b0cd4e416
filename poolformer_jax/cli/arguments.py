"""Arguments that several commands have, and the message that is shown while a command waits."""

import argparse
import itertools
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from poolformer_jax.errors import InputError, MissingFileError
from poolformer_jax.files import files_below
from poolformer_jax.hub import HubOptions
from poolformer_jax.messages import printable
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
    """Adds the weights, as `--weights` or as the positional SOURCE, and `add_source_options`."""
    explained = "a name on the Hugging Face Hub, a model folder, or a weights file"
    if positional:
        parser.add_argument("source", metavar="SOURCE", help=explained)
    else:
        parser.add_argument(
            "--weights", metavar="SOURCE", default=DEFAULT_WEIGHTS, help=f"{explained} (default: %(default)s)"
        )
    add_source_options(parser)


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of every command that reads weights: what a file does not determine, and the Hub's."""
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help="the published network, if the arrays do not determine it: poolformer_ln_s12 looks like s12, and "
        "identityformer_s12 like poolformerv2_s12",
    )
    parser.add_argument(
        "--ignore",
        metavar="GLOB",
        action="append",
        default=[],
        help="leave out the arrays with these names, such as 'criterion.*'; may be repeated",
    )
    parser.add_argument(
        "--ema", action="store_true", dest="use_ema", help="take the moving average of a training checkpoint's weights"
    )
    hub = parser.add_argument_group("Hugging Face Hub")
    hub.add_argument("--revision", metavar="NAME", help="branch, tag or commit")
    hub.add_argument("--cache-dir", metavar="FOLDER", help="the Hub's cache (default: huggingface_hub's, HF_HOME)")
    hub.add_argument("--token", help="for private models (default: the one stored by hf auth login)")
    hub.add_argument("--local-files-only", action="store_true", help="use the cache without asking the Hub")


def source_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `add_source_options` added, as keyword arguments of `open_model`."""
    return {name: getattr(arguments, name) for name in ("variant", "ignore", "use_ema")} | hub_options(arguments)


def hub_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The Hub's options alone, as keyword arguments of `find_model_files`."""
    return {name: getattr(arguments, name) for name in HubOptions.__annotations__}


def add_images(parser: argparse.ArgumentParser) -> None:
    """Adds the images, as files, folders, or a list on standard input."""
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="an image file, a folder of them, or - for names on standard input, one per line",
    )
    parser.add_argument("--recursive", action="store_true", help="also the images in subfolders")


def image_files(arguments: argparse.Namespace) -> list[Path | str]:
    """The given files, and for a folder the image files in it, sorted by name. Raises InputError if there are none."""
    if not (files := [file for name in arguments.images for file in files_of(name, arguments.recursive)]):
        raise InputError("No image was given: standard input is empty. Expected names of images, one per line.")
    return files


def files_of(name: str, recursive: bool = False) -> list[Path | str]:
    """The files of one argument: the file, the image files of a folder, or the names on standard input for "-"."""
    if name == "-":
        return [Path(line) for line in sys.stdin.read().splitlines() if line]
    if "://" in name:  # reading it fails with a hint; a path would lose one of the slashes
        return [name]
    path = Path(name)
    if not path.is_dir():
        return [path]
    from poolformer_jax.images import image_suffixes

    suffixes = image_suffixes()
    inside = files_below(path) if recursive else path.iterdir()
    files = sorted(file for file in inside if file.suffix.lower() in suffixes and file.is_file())
    if not files:
        subfolders = not recursive and any(file.is_dir() for file in path.iterdir())
        hint = " Its subfolders are searched with --recursive." if subfolders else ""
        raise MissingFileError(f"The folder {name} has no image file. Expected at least one.{hint}")
    return [*files]


def add_batches(parser: argparse.ArgumentParser) -> None:
    """Adds how batches of images are computed."""
    parser.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="images computed at once (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="compute type (default: %(default)s)"
    )
    parser.add_argument(
        "--compilation-cache", metavar="FOLDER", help="keep compiled programs there, for a faster next start"
    )


def batch_options(arguments: argparse.Namespace, images: int) -> dict[str, Any]:
    """What `add_batches` added, as keyword arguments of `from_pretrained`."""
    return {
        "batch_size": min(arguments.batch_size, images),
        "dtype": arguments.dtype,
        "compilation_cache_dir": arguments.compilation_cache,
    }


def add_runtime(parser: argparse.ArgumentParser) -> None:
    """Adds `--runtime`: the library that computes the network."""
    parser.add_argument(
        "--runtime",
        choices=("jax", "openvino", "onnxruntime"),
        default="jax",
        help="what computes the network; the other two are faster on CPUs (default: %(default)s)",
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
        message = printable(message, 2 * width)
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

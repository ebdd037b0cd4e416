"""`verify`: exported files compared with the network."""

import argparse
from pathlib import Path

from poolformer_jax.cli.arguments import add_source_options, source_options, starting_jax, waiting
from poolformer_jax.errors import InputError, MissingFileError, PoolFormerError
from poolformer_jax.messages import MAX_MESSAGE, printable

NAME = "verify"
HELP = "Compare exported files with the network that they came from."
EXAMPLE = """  python -m poolformer_jax verify runs/digits/model
  python -m poolformer_jax verify exported/ --weights sail/poolformer_s12

Exit code 0 if every file computes the network's logits, otherwise 1."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("folder", metavar="FOLDER", help="a folder with exported files")
    parser.add_argument(
        "--weights", metavar="SOURCE", help="the network: a name on the Hub, a folder, or a file (default: FOLDER)"
    )
    add_source_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints a line for each file; returns the exit code."""
    folder = Path(arguments.folder).expanduser()
    if folder.is_file():
        raise InputError(f"{folder} is a file. Expected its folder, and --weights SOURCE if the weights are elsewhere.")
    source = arguments.weights or arguments.folder
    with starting_jax():
        from poolformer_jax.export import FORMATS, verify_file
        from poolformer_jax.weights import build_model, open_model
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in FORMATS)
    if not files:
        raise MissingFileError(f"{folder} has no exported file. Expected names that end in {' or '.join(FORMATS)}.")
    with waiting(f"Loading {source}"):
        model, variables = build_model(open_model(source, **source_options(arguments)))
    failed = 0
    for file in files:
        try:
            with waiting(f"Comparing {file}"):
                difference = verify_file(file, model.config, variables)
            result = f"logits differ from the network's by at most {difference:.1e} of the largest"
        except PoolFormerError as error:
            failed += 1
            result = str(error)
        print(f"{printable(file, MAX_MESSAGE)}: {result}")
    return 1 if failed else 0

"""The command line: `python -m convert SOURCE DESTINATION`, and `python -m convert inspect SOURCE`.

Exit status: 0 done, 1 failed (with a message on stderr), 2 wrong usage, 130 interrupted.
"""

import argparse
import dataclasses
import os
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from convert import display, report
from convert.conversion import ArrayMapping, check_destination, convert, identify_source
from poolformer_jax.cli import HelpFormatter, add_source_options, hub_options
from poolformer_jax.errors import InputError, PoolFormerError
from poolformer_jax.files import write_json
from poolformer_jax.messages import MAX_MESSAGE, printable
from poolformer_jax.network import WeightsMismatch
from poolformer_jax.process import DONE, exit_on_interrupt, print_error, run_program
from poolformer_jax.version import __version__
from poolformer_jax.weights import LAYOUTS, ModelFiles, OpenedModel, WeightsFile, find_model_files, open_weights

if TYPE_CHECKING:
    from convert.verification import Verification

_CONVERT_EXAMPLES = """examples:
  python -m convert sail/poolformer_s12 models/s12
  python -m convert poolformer_m48.pth.tar models/m48 --verify
  python -m convert models/s12 for-transformers --to hf
  python -m convert inspect checkpoint.pth.tar
"""
_INSPECT_EXAMPLES = """examples:
  python -m convert inspect poolformer_s12.pth.tar
  python -m convert inspect timm/poolformer_s12.sail_in1k
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code."""
    return run_program(partial(_run, list(sys.argv[1:] if arguments is None else arguments)))


def _run(given: list[str]) -> int:
    # rich takes the environment variable FORCE_COLOR for a terminal that can redraw a progress bar.
    is_terminal = None if sys.stdout.isatty() else False
    console = Console(highlight=False, markup=False, force_terminal=is_terminal)
    inspecting = given[:1] == ["inspect"]
    parser = _inspect_parser() if inspecting else _convert_parser()
    options = parser.parse_args(given[1:] if inspecting else given)
    if not inspecting and options.source == "inspect":
        parser.error("inspect comes before every option: python -m convert inspect SOURCE ...")
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        try:
            return (_inspect if inspecting else _convert)(options, console)
        finally:
            for note in notes:
                print_error(str(note.message), "note")


def _convert(options: argparse.Namespace, console: Console) -> int:
    destination = Path(options.destination)
    if destination.suffix in (".onnx", ".xml", ".stablehlo", ".pth", ".tar", ".bin", ".safetensors"):
        raise InputError(
            f"{destination} looks like the name of a file. Expected that of a folder; python -m poolformer_jax export "
            "writes ONNX, OpenVINO and StableHLO files."
        )
    files, weights = _open(options)
    if options.report:
        report.check_path(Path(options.report), destination, files, weights)
    check_destination(destination, weights, overwrite=options.overwrite)
    try:
        source = identify_source(files, weights, options.variant)
    except WeightsMismatch as error:
        if options.report:
            write_json(Path(options.report), {"source": {"given": options.source}, **report.mismatches(error)})
        raise
    display.show_source(console, report.describe_source(source))
    # Hashing needs the processor, and the conversion mostly the disk.
    with ThreadPoolExecutor(1) as pool, display.progress(console) as bar:
        hashed = pool.submit(report.describe_files, weights)
        task = bar.add_task("converting", total=weights.nbytes)
        mappings = convert(source, destination, options.to, lambda size: bar.advance(task, size), report.FILE)
        content = report.describe_conversion(source, hashed.result(), destination, options.to, mappings)
    display.show_mappings(console, mappings)
    result = _verify(source, destination, mappings, console) if options.verify else None
    content["verification"] = dataclasses.asdict(result) | {"passed": result.passed} if result else None
    path = Path(options.report or destination / report.FILE)
    write_json(path, content)
    if result and not result.passed:
        raise InputError(f"{destination} does not compute what {options.source} computes; {path} has the differences.")
    console.print(f"\nModel    {destination}\nReport   {path}", soft_wrap=True)
    return DONE


def _open(options: argparse.Namespace) -> tuple[ModelFiles, WeightsFile]:
    files = find_model_files(options.source, **hub_options(options))
    return files, open_weights(files.weights, use_ema=options.use_ema, ignore=options.ignore)


def _verify(source: OpenedModel, destination: Path, mappings: list[ArrayMapping], console: Console) -> "Verification":
    with exit_on_interrupt():
        from convert.verification import verify  # imports jax, which a conversion does not need

    with console.status("verifying"):
        result = verify(source, destination, mappings)
    display.show_verification(console, result)
    return result


def _inspect(options: argparse.Namespace, console: Console) -> int:
    files, weights = _open(options)
    console.print(printable(files.weights, MAX_MESSAGE), soft_wrap=True)
    try:
        description = report.describe_source(identify_source(files, weights, options.variant))
    except PoolFormerError:
        display.show_source(console, report.describe_file(weights))
        raise
    display.show_source(console, description)
    return DONE


def _convert_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "python -m convert",
        "Converts PoolFormer weights between the layouts of JAX and PyTorch, without PyTorch, and writes a report. "
        "`python -m convert inspect SOURCE` describes a file without converting it.",
        _CONVERT_EXAMPLES,
    )
    parser.add_argument("destination", metavar="DESTINATION", type=_name, help="the folder to write, with report.json")
    parser.add_argument("--to", choices=[*LAYOUTS], default="jax", help="layout of the folder (default: jax)")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is in DESTINATION")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read the folder again and compare every bit, and every stage's output with PyTorch's if installed",
    )
    parser.add_argument(
        "--report", metavar="FILE", type=_name, help="write the report there, also if names do not match"
    )
    return parser


def _inspect_parser() -> argparse.ArgumentParser:
    return _parser(
        "python -m convert inspect",
        "Describes a weights file, a folder or a model on the Hub: container, layout, variant, classes. "
        "The exit code is 0 if it is a complete PoolFormer.",
        _INSPECT_EXAMPLES,
    )


def _parser(program: str, description: str, examples: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog=examples,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"poolformer-jax {__version__}")
    parser.add_argument(
        "source", metavar="SOURCE", type=_name, help="a weights file, a folder, or a name on the Hugging Face Hub"
    )
    add_source_options(parser)
    return parser


def _name(text: str) -> str:
    if not text:  # such as an unset shell variable; Path("") is the current folder
        raise argparse.ArgumentTypeError("is empty, expected a name")
    return os.path.expanduser(text)  # noqa: PTH111 - a name on the Hub is not a path

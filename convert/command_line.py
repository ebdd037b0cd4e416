"""The command line: `python -m convert SOURCE DESTINATION`, and `python -m convert inspect SOURCE`.

Exit status: 0 done, 1 failed (one message on stderr says why), 2 wrong usage, 130 interrupted.
"""

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from convert import display, report
from convert.conversion import Mapped, Source, convert, open_source
from poolformer_jax.cli.arguments import HelpFormatter
from poolformer_jax.errors import InputError
from poolformer_jax.files import write_json
from poolformer_jax.process import exit_on_interrupt, interrupt_exit_code
from poolformer_jax.weights import WeightsMismatch
from poolformer_jax.weights.containers.files import open_weights
from poolformer_jax.weights.names import LAYOUTS
from poolformer_jax.weights.source import find_model_files

if TYPE_CHECKING:
    from convert.verification import Verification

DONE, FAILED = 0, 1

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
    """Runs the program; returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        inspecting = given[:1] == ["inspect"]
        parser = _inspect_parser() if inspecting else _convert_parser()
        options = parser.parse_args(given[1:] if inspecting else given)
        if not inspecting and options.source == "inspect":
            parser.error("inspect comes before every option: python -m convert inspect SOURCE ...")
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *_: errors.print(f"note: {message}", markup=False)
            return (_inspect if inspecting else _convert)(options, console)
    except KeyboardInterrupt:
        return interrupt_exit_code()
    except (ValueError, OSError, ImportError) as error:  # what the library raises for bad input; the rest is a bug
        errors.print(f"error: {error}", markup=False)
        return FAILED


def _convert(options: argparse.Namespace, console: Console) -> int:
    destination = Path(options.destination)
    hub = _hub_options(options)
    if options.report:
        report.check(Path(options.report), destination)
        files = find_model_files(options.source, **hub)
        report.check_spares(Path(options.report), files, open_weights(files.weights, use_ema=options.ema))
    try:
        source = open_source(options.source, use_ema=options.ema, variant=options.variant, **hub)
    except WeightsMismatch as error:
        if options.report:
            write_json(Path(options.report), {"source": {"given": options.source}, **report.left_over(error)})
        raise
    display.show_source(console, report.describe_source(source))
    # The hash needs the processor, and the conversion mostly the disk.
    with ThreadPoolExecutor(1) as pool, display.progress(console) as bar:
        hashed = pool.submit(report.describe_files, source.weights)
        task = bar.add_task("converting", total=source.weights.nbytes)
        mapped = convert(source, destination, options.to, lambda size: bar.advance(task, size))
        account = report.describe_conversion(source, hashed.result(), destination, options.to, mapped)
    display.show_mapping(console, mapped)
    result = _verify(source, destination, mapped, console) if options.verify else None
    account["verification"] = dataclasses.asdict(result) | {"passed": result.passed} if result else None
    path = Path(options.report or destination / report.FILE)
    write_json(path, account)
    if result and not result.passed:
        raise InputError(f"{destination} does not compute what {options.source} computes; {path} has the differences.")
    console.print(f"\nModel    {destination}\nReport   {path}", soft_wrap=True)
    return DONE


def _verify(source: Source, destination: Path, mapped: list[Mapped], console: Console) -> "Verification":
    with exit_on_interrupt():
        from convert.verification import verify  # the network, which a conversion does not need

    with console.status("verifying"):
        result = verify(source, destination, mapped)
    display.show_verification(console, result)
    return result


def _inspect(options: argparse.Namespace, console: Console) -> int:
    files = find_model_files(options.source, **_hub_options(options))
    weights = open_weights(files.weights, use_ema=options.ema)
    console.print(str(files.weights), soft_wrap=True)
    try:
        source = open_source(options.source, use_ema=options.ema, **_hub_options(options))
    except (ValueError, FileNotFoundError):
        display.show_source(console, report.describe_file(weights))
        raise
    display.show_source(console, report.describe_source(source))
    return DONE


def _convert_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "python -m convert",
        "Converts PoolFormer weights from any home to any other, without PyTorch, and says what it did. "
        "`python -m convert inspect SOURCE` says what a file is without converting it.",
        _CONVERT_EXAMPLES,
    )
    parser.add_argument(
        "destination", metavar="DESTINATION", type=_name, help="the folder to write; report.json goes there too"
    )
    parser.add_argument("--to", choices=[*LAYOUTS], default="jax", help="whose names the folder has (default: jax)")
    parser.add_argument(
        "--variant",
        help="the published network, where arrays do not tell it: metaformer_id_s12 looks like s12",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read the folder again and compare every bit, and every stage's output with PyTorch if it is installed",
    )
    parser.add_argument(
        "--report", metavar="FILE", type=_name, help="where the report goes instead, also when names are left over"
    )
    return parser


def _inspect_parser() -> argparse.ArgumentParser:
    return _parser(
        "python -m convert inspect",
        "Says what a weights file, a folder or a model on the Hub is: container, layout, variant, classes. "
        "The exit status is 0 if it is a complete PoolFormer.",
        _INSPECT_EXAMPLES,
    )


def _parser(program: str, description: str, examples: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog=examples,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "source", metavar="SOURCE", type=_name, help="a weights file, a folder, or a name on the Hugging Face Hub"
    )
    parser.add_argument("--ema", action="store_true", help="take the moving average of a training checkpoint's weights")
    hub = parser.add_argument_group("the Hugging Face Hub")
    hub.add_argument("--revision", help="branch, tag or commit")
    hub.add_argument("--cache-dir", metavar="FOLDER", help="its cache (default: where huggingface_hub keeps it)")
    hub.add_argument("--local-files-only", action="store_true", help="take what the cache has and ask nobody")
    return parser


def _name(text: str) -> str:
    if not text:  # as of a shell's variable that is not set; for Path it is the current folder
        raise argparse.ArgumentTypeError("is empty, expected a name")
    if not text.startswith("~"):
        return text
    try:
        # Once and here: a shell does so only for what begins a word without quotes, and all that follows takes paths.
        return str(Path(text).expanduser())
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: there is no such home on this machine, expected another or the whole path"
        ) from error


def _hub_options(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("revision", "cache_dir", "local_files_only")}

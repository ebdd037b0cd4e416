"""The command line of `python -m train`: a recipe with its flags, or one of the other commands.

Exit codes: 0 done (or stopped by SIGTERM with the state saved), 1 failed, 2 the command line is wrong, 3 the training
diverged (the same command would diverge again), 130 Ctrl-C.
Nothing here imports jax before a command runs: data-loading workers run the main module again.
"""

import difflib
import itertools
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from poolformer_jax.process import INTERRUPTED, exit_on_interrupt, print_error
from poolformer_jax.version import __version__
from train.failures import exit_code, message_of
from train.flags import config_from_flags, fill, recipe_from_flags

if TYPE_CHECKING:
    from train.config import TrainConfig

_DEFAULT = "digits"


def main(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code."""
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _has_no_reader():
            return 0
        if (message := message_of(error)) is None:
            raise
        print(file=sys.stderr)
        print_error(message)
        return exit_code(error)


def _run(arguments: Sequence[str]) -> int:
    name, rest = (arguments[0], list(arguments[1:])) if arguments else (_DEFAULT, [])
    if name in ("-h", "--help"):
        return _overview()
    if name == "--version":
        print(f"poolformer-jax {__version__}")
        return 0
    if (file := _recipe_file(arguments)) is not None:
        with exit_on_interrupt("stopped"):
            from train import loop
        return _train(*file)
    if name not in COMMANDS and any(argument.partition("=")[0] == "--recipe" for argument in arguments):
        print("--recipe FILE comes first: python -m train --recipe FILE [OPTIONS].", file=sys.stderr)
        return 2
    if name.startswith("-"):
        name, rest = _DEFAULT, list(arguments)
    with exit_on_interrupt("stopped"):
        from train import loop  # noqa: F401 -- with everything that takes long to import
        from train.recipes import RECIPES

    if name in COMMANDS:
        return COMMANDS[name][1](rest)
    if name in RECIPES:
        return _train(name, rest)
    near = difflib.get_close_matches(name, [*RECIPES, *COMMANDS], n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    print(f"There is no recipe or command {name!r}.{hint}\nAll of them: python -m train --help", file=sys.stderr)
    return 2


def _recipe_file(arguments: Sequence[str]) -> tuple[Path, list[str]] | None:
    """The file of `--recipe FILE ...` and the arguments after it; None without."""
    first, *rest = arguments or [""]
    if first == "--recipe" and rest:
        return Path(rest[0]), rest[1:]
    return (Path(first.partition("=")[2]), rest) if first.startswith("--recipe=") else None


def _has_no_reader() -> bool:
    """True if the reader of our output has closed it, as `... | head` does; further output is then discarded."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _train(name: str | Path, arguments: Sequence[str]) -> int:
    config = recipe_from_flags(name, arguments, "python -m train")
    import jax

    from train import loop
    from train.report import create_console, print_summary

    outcome = loop.run(config, create_console())
    print_summary(config, outcome.step, outcome.evaluations)
    if name == "smoke" and outcome.evaluations and jax.process_index() == 0:
        print("\nPassed: images, training, checkpoints, evaluation and results work here. The accuracy means nothing.")
    return 128 + signal.SIGINT if outcome.stopped_by is signal.SIGINT else 0


def _evaluate(arguments: Sequence[str]) -> int:
    """Top-1, top-5 and loss of a model over a whole split.

    Example:  python -m train evaluate sail/poolformer_s12 --data folder:imagenet
    """
    from train.commands import EvaluateConfig, run_evaluation
    from train.report import create_console

    config = config_from_flags(EvaluateConfig, "evaluate", _evaluate.__doc__ or "", arguments)
    run_evaluation(config, create_console())
    return 0


def _probe(arguments: Sequence[str]) -> int:
    """How well the features of a network separate classes: a linear probe and k-NN, with scikit-learn.

    Each image is computed once, without augmentation, on this host. With --output the linear probe becomes the head of
    a model folder, which is the quickest way to a classifier of your own classes.

    Example:  python -m train probe sail/poolformer_s12 --data folder:/data/flowers
    """
    from train.commands import ProbeConfig, run_probe
    from train.report import create_console

    run_probe(config_from_flags(ProbeConfig, "probe", _probe.__doc__ or "", arguments), create_console())
    return 0


def _prepare(arguments: Sequence[str]) -> int:
    """Pack class folders, or ImageNet's archives, into shards for fast random access.

    The same command resumes an interrupted run.

    Example:  python -m train prepare folder:/data/flowers /data/packed
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from train.data import PrepareConfig, prepare_data
    from train.report import create_console

    config = config_from_flags(PrepareConfig, "prepare", _prepare.__doc__ or "", arguments)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Without the bar's thread: TFDS replaces `__import__` while it imports late, and the thread fails on that.
    with Progress(*columns, console=create_console(), auto_refresh=False) as bar:
        task = bar.add_task("listing", total=None)

        def show(progress: object) -> None:
            images, total = progress.images, progress.total_images  # type: ignore[attr-defined]
            doing = "listing" if total is None else "packing"
            bar.update(task, completed=images, total=total, description=doing, refresh=True)

        prepared = prepare_data(config, show)
    if prepared.was_packed:
        print("already packed; nothing was written")
    for split, images in prepared.images.items():
        print(f"{split}: {images:,} images")
    for line in prepared.skipped:
        print(line)
    for name in prepared.left_out:
        print(f"left out: {name}")
    print(f"Train on it with --data.source tfds:{prepared.folder}")
    return 0


def _throughput(arguments: Sequence[str]) -> int:
    """Images per second of the input pipeline alone.

    If training consumes more, the accelerator waits: add workers, or pack the data set (`prepare`).

    Example:  python -m train throughput --source folder:/data/flowers --workers 8
    """
    from train.commands import ThroughputConfig, run_throughput

    run_throughput(config_from_flags(ThroughputConfig, "throughput", _throughput.__doc__ or "", arguments))
    return 0


def _doctor(arguments: Sequence[str]) -> int:
    """Check a recipe, its data and this machine before a long run.

    Example:  python -m train doctor imagenet-s12 --data.source tfds:imagenet2012
    """
    config = _recipe_of_command("doctor", _doctor.__doc__ or "", arguments)
    if isinstance(config, int):
        return config
    from train.commands import examine, print_findings
    from train.report import create_console

    return print_findings(examine(config), create_console())


def _show(arguments: Sequence[str]) -> int:
    """Write a sheet of augmented pictures with their targets, as the network sees them.

    The sheet is augmented.png in the recipe's --run-dir; its pictures are of the first batch.

    Example:  python -m train show finetune --data.source folder:flowers
    """
    config = _recipe_of_command("show", _show.__doc__ or "", arguments)
    if isinstance(config, int):
        return config
    from train.commands import show_batch

    print(f"Written to {show_batch(config)}")
    return 0


def _recipe_of_command(command: str, description: str, arguments: Sequence[str]) -> "TrainConfig | int":
    """The recipe that a command's arguments name, with their flags; or an exit code, after printing why."""
    from train.recipes import RECIPES

    name, rest = _recipe_file(arguments) or (arguments[0] if arguments else "", list(arguments[1:]))
    if name in ("-h", "--help"):
        print(f"usage: python -m train {command} RECIPE [--FIELD VALUE ...]\n\n" + fill(description))
        print("\n" + fill(f"Recipes: {', '.join(_recipe_groups())}. The flags are those of the recipe."))
        return 0
    if isinstance(name, str) and name not in RECIPES:
        print(f"{command} {name!r}: expected a recipe, one of: {', '.join(_recipe_groups())}.", file=sys.stderr)
        return 2
    return recipe_from_flags(name, rest, f"python -m train {command}")


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "evaluate": ("top-1, top-5 and loss of any model over a whole split", _evaluate),
    "probe": ("linear probe and k-NN on a network's features, without training it", _probe),
    "prepare": ("pack folders or ImageNet's archives for fast random access", _prepare),
    "throughput": ("images per second of the input pipeline alone", _throughput),
    "show": ("write a sheet of augmented pictures with their targets", _show),
    "doctor": ("check a recipe, its data and this machine before a long run", _doctor),
}


def _overview() -> int:
    groups = _recipe_groups()
    width = max(map(len, COMMANDS)) + 2
    print(
        "usage: python -m train [RECIPE] [--FIELD VALUE ...]\n"
        "       python -m train --recipe FILE [--FIELD VALUE ...]\n"
        "       python -m train COMMAND ...\n\nrecipes:"
    )
    for names, summary in groups.items():
        print(f"  {names:<{width}}{summary}" if len(names) < width else f"  {names}\n  {'':<{width}}{summary}")
    print("\ncommands:")
    for name, (summary, _) in COMMANDS.items():
        print(f"  {name:<{width}}{summary}")
    print(
        "\nWithout a recipe: digits. FILE is a recipe.json that a run wrote.\n"
        "Every field of a recipe is a flag, listed by\n"
        "  python -m train imagenet-s12 --help\n"
        "examples:\n"
        "  python -m train digits --run-dir runs/mine --optimizer.epochs 30\n"
        "  python -m train finetune --data.source folder:flowers"
    )
    return 0


def _recipe_groups() -> dict[str, str]:
    """The summary of every recipe, by its name; recipes with one summary are grouped as in "imagenet-{s12,s24}"."""
    from train.recipes import RECIPES

    groups = {}
    for summary, group in itertools.groupby(RECIPES, lambda name: RECIPES[name].summary):
        names = list(group)
        prefix = os.path.commonprefix(names)  # noqa: RUF071 - of characters, not of folders
        rest = ",".join(name.removeprefix(prefix) for name in names)
        groups[names[0] if len(names) == 1 else f"{prefix}{{{rest}}}"] = summary
    return groups

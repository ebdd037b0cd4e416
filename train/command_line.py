"""What `python -m train` understands: a recipe with its flags, or one of the commands around it.

Exit codes: 0 done (or stopped by SIGTERM, its state saved), 1 failed, 2 the command line is wrong, 130 Ctrl-C.
"""

import inspect
import logging
import signal
import sys
from collections.abc import Callable, Sequence

COMMANDS = {
    "evaluate": "top-1, top-5 and loss of any model over a whole split",
    "prepare": "pack class folders into shards for fast random access",
    "doctor": "check a recipe, its data and this machine before a long run",
}


def main(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code."""
    command, rest = (arguments[0], list(arguments[1:])) if arguments else ("digits", [])
    if command.startswith("-") and command not in ("-h", "--help"):
        command, rest = "digits", list(arguments)
    if command in ("-h", "--help"):
        return _overview()
    # Only now: whatever imports jax takes seconds, and data-loading workers must do without.
    from train import recipes

    if command in recipes.RECIPES:
        return _guarded(lambda: _train(command, rest))
    if command in COMMANDS:
        return _guarded(lambda: _around(command, rest))
    known = ", ".join([*recipes.RECIPES, *COMMANDS])
    print(f"There is no recipe or command {command!r}. Expected one of: {known}.", file=sys.stderr)
    return 2


def _guarded(action: Callable[[], int]) -> int:
    """Runs `action`, and turns what a person can mend into one message instead of a traceback."""
    from train.checkpoints import CheckpointError
    from train.loop import TrainingError

    try:
        return action()
    except (CheckpointError, TrainingError, ValueError, OSError, RuntimeError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 128 + signal.SIGINT


def _train(name: str, arguments: Sequence[str]) -> int:
    import tyro
    from rich.console import Console
    from rich.logging import RichHandler

    from train import loop, results
    from train.recipes import RECIPES, TrainConfig

    recipe = RECIPES[name]
    config = tyro.cli(
        TrainConfig,
        prog=f"python -m train {name}",
        description=inspect.cleandoc(recipe.details),
        default=recipe.config,
        args=list(arguments),
        config=(tyro.conf.AvoidSubcommands,),
    )
    console = Console(stderr=True)
    handler = RichHandler(console=console, show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    outcome = loop.run(config, console)
    print(results.closing_words(config, outcome.step, outcome.evaluations))
    return 128 + signal.SIGINT if outcome.stopped_by is signal.SIGINT else 0


def _overview() -> int:
    from train.recipes import RECIPES

    width = max(map(len, [*RECIPES, *COMMANDS])) + 2
    print("usage: python -m train [RECIPE] [--FIELD VALUE ...]\n       python -m train COMMAND ...\n\nrecipes:")
    for name, recipe in RECIPES.items():
        print(f"  {name:<{width}}{recipe.summary}")
    print("\ncommands:")
    for name, summary in COMMANDS.items():
        print(f"  {name:<{width}}{summary}")
    print(
        "\nWithout a recipe, digits. Every field of a recipe is a flag: python -m train imagenet-s12 --help\n"
        "example: python -m train digits --run-dir runs/mine --optimizer.epochs 30"
    )
    return 0


def _around(command: str, arguments: Sequence[str]) -> int:
    raise NotImplementedError(command)

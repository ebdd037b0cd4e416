"""Recipes and other configs from the flags of a command line."""

import dataclasses
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_args

from poolformer_jax.process import print_error

if TYPE_CHECKING:
    from train.config import TrainConfig

_Config = TypeVar("_Config")


def config_from_flags(kind: type[_Config], command: str, description: str, arguments: Sequence[str]) -> _Config:
    """The config of a command other than a recipe."""
    import tyro

    return tyro.cli(kind, prog=f"python -m train {command}", description=fill(description), args=list(arguments))


def recipe_from_flags(name: str | Path, arguments: Sequence[str], program: str) -> "TrainConfig":
    """The recipe of this name or in this file, changed by flags."""
    import tyro

    from train.config import TrainConfig, read_recipe_file
    from train.recipes import RECIPES

    if isinstance(name, Path):
        recipe, details, chosen = read_recipe_file(name), f"The recipe in {name}", f"--recipe {name}"
    else:
        recipe, details, chosen = RECIPES[name].config, fill(RECIPES[name].details), name
    line = " ".join(arguments).replace("_", "-")
    return tyro.cli(
        TrainConfig,
        prog=f"{program} {chosen}",
        description=details,
        default=_change_optimizer(_fit_warmup(recipe, line), line),
        args=list(arguments),
        config=(tyro.conf.AvoidSubcommands,),
    )


def _fit_warmup(recipe: "TrainConfig", line: str) -> "TrainConfig":
    """The recipe with a warm-up that is shorter than `--optimizer.epochs`, unless the warm-up is given too."""
    given = re.search(r"--optimizer\.epochs[ =](\d+)", line)
    before = recipe.optimizer.warmup_epochs
    if given is None or not 1 <= int(given[1]) <= before or "--optimizer.warmup-epochs" in line:
        return recipe
    epochs = int(given[1])
    print_error(
        f"The warm-up of this recipe is shortened from {before} to {epochs - 1} epochs, to fit --optimizer.epochs "
        f"{epochs}. --optimizer.warmup-epochs sets it.",
        "note",
    )
    optimizer = dataclasses.replace(recipe.optimizer, warmup_epochs=epochs - 1)
    return dataclasses.replace(recipe, optimizer=optimizer)


_OF_ONE_OPTIMIZER = ("learning_rate", "weight_decay", "beta1", "beta2", "epsilon", "clip_norm")


def _change_optimizer(recipe: "TrainConfig", line: str) -> "TrainConfig":
    """The recipe with the defaults of the optimizer in `--optimizer.name`; prints what it keeps of another optimizer.

    What the recipe sets to other values than the defaults of its optimizer stays, as do learning rate and decay.
    """
    from train.config import OptimizerName

    given = re.findall(r"--optimizer\.name[ =](\S+)", line)
    before = recipe.optimizer.name
    if not given or given[-1] == before or given[-1] not in get_args(OptimizerName):
        return recipe
    optimizer = recipe.optimizer.without_defaults()
    flags = {name: f"--optimizer.{name.replace('_', '-')}" for name in _OF_ONE_OPTIMIZER}
    values = {flag: getattr(optimizer, name) for name, flag in flags.items() if flag not in line}
    kept = "".join(f"\n  {flag} {value}" for flag, value in values.items() if value is not None)
    if kept:
        print(f"These values of the recipe, which are for {before}, stay with {given[-1]}:{kept}", file=sys.stderr)
    return dataclasses.replace(recipe, optimizer=optimizer)


def fill(text: str) -> str:
    """Wraps paragraphs to the width of the screen; commands stay on one line, for copying."""
    width = shutil.get_terminal_size().columns
    # tyro joins a line that begins with a letter to the one before.
    wrapper = textwrap.TextWrapper(width, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(part if "python -m" in part else wrapper.fill(part) for part in paragraphs)

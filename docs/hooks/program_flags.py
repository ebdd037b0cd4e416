"""A mkdocs hook: one page for each program, with what `--help` prints.

The text comes from the parsers at build time, so no flag is written down twice.
"""

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # printing a help text must not claim a TPU

_WIDTH = "80"  # columns of the help texts
_LISTED_RECIPES = ("imagenet-s12", "finetune")  # the two kinds of flags: of a new network, and of a pretrained one
_REFERENCE_RECIPE = _LISTED_RECIPES[0]


class Program(NamedTuple):
    """A program's title, first sentence, entry point, and the command lines whose `--help` its page shows."""

    name: str
    summary: str
    main: Callable[[list[str]], int]
    commands: list[list[str]]


def programs() -> Iterator[Program]:
    """The four programs; importing them here keeps `mkdocs --version` quick."""
    import benchmarks.__main__
    import convert.command_line
    import poolformer_jax.cli
    import train.command_line

    yield Program(
        "poolformer_jax",
        "Classify and embed images, look inside the network, export it. Part of the wheel.",
        poolformer_jax.cli.main,
        [[], *([command.NAME] for command in poolformer_jax.cli.COMMANDS)],
    )
    yield Program(
        "train",
        "Train, fine-tune and evaluate. Runs from a checkout installed with `pip install -e '.[train]'`.",
        train.command_line.main,
        [[], *([name] for name in (*_LISTED_RECIPES, *train.command_line.COMMANDS))],
    )
    yield Program(
        "convert",
        "Convert weights between all layouts. Runs from a checkout installed with `pip install -e '.[convert]'`.",
        convert.command_line.main,
        [[], ["inspect"]],
    )
    yield Program(
        "benchmarks",
        "Compare this package with other libraries. Runs from a checkout installed with `pip install -e '.[bench]'`.",
        benchmarks.__main__.main,
        [[], *([name] for name in benchmarks.__main__.BENCHMARKS)],
    )


def help_text(main: Callable[[list[str]], int], command: list[str]) -> str:
    """What `main([*command, "--help"])` prints, without the boxes that tyro draws."""
    printed = io.StringIO()
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = _WIDTH
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([*command, "--help"])
    finally:
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns
    lines = "\n".join(line.rstrip() for line in printed.getvalue().splitlines())
    titled = re.sub(r"^ (\S.*)\n -+$", r"\1:", lines, flags=re.MULTILINE)
    return re.sub(r"^ +-{20,}\n", "", titled, flags=re.MULTILINE).strip()


def page(program: Program) -> str:
    """The Markdown page of one program."""
    parts = [f"# python -m {program.name}", program.summary]
    for command in program.commands:
        line = " ".join(["python -m", program.name, *command])
        parts += [
            f"## {' '.join(command) or 'Overview'}",
            f'```text title="{line} --help"\n{help_text(program.main, command)}\n```',
        ]
    if program.name == "train":
        parts.append(_recipe_defaults())
    return "\n\n".join(parts) + "\n"


def _recipe_defaults() -> str:
    """A table of the fields whose default differs from the reference recipe's, for each recipe not listed above."""
    from train.recipes import RECIPES

    reference = _fields(RECIPES[_REFERENCE_RECIPE].config.to_dict())
    rows = []
    for name, recipe in RECIPES.items():
        if name not in _LISTED_RECIPES:
            fields = _fields(recipe.config.to_dict())
            changed = [f"`{field} = {value}`" for field, value in fields.items() if reference.get(field) != value]
            rows.append(f"| `{name}` | {', '.join(changed)} |")
    title = (
        f"## Defaults of the other recipes\n\nTheir flags are those of `{_REFERENCE_RECIPE}`, with other defaults:\n"
    )
    return "\n".join([title, "| recipe | defaults |", "|---|---|", *rows])


def _fields(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The values of a recipe by the name that a flag gives each, without the dashes before it."""
    fields: dict[str, str] = {}
    for name, value in tree.items():
        full_name = prefix + name.replace("_", "-")
        if isinstance(value, Mapping):
            fields |= _fields(value, f"{full_name}.")
        else:
            fields[full_name] = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return fields


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages; mkdocs calls this once it has listed the files."""
    from mkdocs.structure.files import File

    for program in programs():
        files.append(File.generated(config, f"programs/{program.name}.md", content=page(program)))
    return files

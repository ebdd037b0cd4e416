"""The programs can parse every command that the guides and the recipes' help show."""

import argparse
import inspect
import json
import re
import shlex

import pytest
import tyro

import benchmarks.__main__
import convert.command_line
import poolformer_jax.cli
import train.command_line
from paths import ROOT
from train.command_line import COMMANDS
from train.recipes import RECIPES

PROGRAMS = {
    "train": train.command_line.main,
    "convert": convert.command_line.main,
    "poolformer_jax": poolformer_jax.cli.main,
    "benchmarks": benchmarks.__main__.main,
}
# A command at the start of a line, with its continuation lines and without its comment.
COMMAND = re.compile(r"^(?: *|Command:  |Example:  )python -m ([a-z_.]+)\b((?:[^\\\n#]|\\\n)*)", re.MULTILINE)


def documented_commands():
    guides = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    texts = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in guides if path.exists()}
    texts |= {f"help of {name}": inspect.cleandoc(recipe.details) for name, recipe in RECIPES.items()}
    texts |= {f"help of {name}": inspect.getdoc(command) for name, (_, command) in COMMANDS.items()}
    for place, text in texts.items():
        for program, line in COMMAND.findall(text):
            arguments = [one for one in shlex.split(line.replace("\\\n", " ")) if one != "..."]
            if program not in ("pytest", "venv"):
                yield pytest.param(program, arguments, id=f"{place}: {program} {' '.join(arguments)}")


class Parsed(BaseException):
    """Raised after a program has parsed its command line."""


@pytest.fixture
def stop_after_parsing(monkeypatch):
    def stopping_after(parse):
        def parse_and_stop(*args, **options):
            parsed = parse(*args, **options)
            if list(vars(parsed)) == ["name"]:  # `benchmarks NAME`, whose options a second parser reads
                return parsed
            raise Parsed

        return parse_and_stop

    monkeypatch.setattr(tyro, "cli", stopping_after(tyro.cli))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stopping_after(argparse.ArgumentParser.parse_args))


@pytest.fixture
def files_of_runs(tmp_path, monkeypatch):
    """A folder with the recipe of a run, which a command line may name."""
    (tmp_path / "runs" / "flowers").mkdir(parents=True)
    recipe = json.dumps(RECIPES["finetune"].config.to_dict())
    (tmp_path / "runs" / "flowers" / "recipe.json").write_text(recipe)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("stop_after_parsing", "files_of_runs")
@pytest.mark.parametrize(("program", "arguments"), list(documented_commands()))
def test_a_documented_command_can_be_parsed(program, arguments):
    with pytest.raises(Parsed):
        PROGRAMS[program](arguments)

"""Every command that the documents and the recipes' help show is one that the programs understand."""

import argparse
import inspect
import re
import shlex

import pytest
import tyro

import benchmarks.__main__
import convert.command_line
import poolformer_jax.cli
import train.command_line
import train.commands.throughput
from paths import ROOT
from train.command_line import COMMANDS
from train.recipes import RECIPES

PROGRAMS = {
    "train": train.command_line.main,
    "train.commands.throughput": train.commands.throughput.main,
    "convert": convert.command_line.main,
    "poolformer_jax": poolformer_jax.cli.main,
    "benchmarks": benchmarks.__main__.main,
}
# At the beginning of a line, with the lines that a backslash at its end takes in, and without a comment.
SHOWN = re.compile(r"^(?: *|Command:  |Example:  )python -m ([a-z_.]+)\b((?:[^\\\n#]|\\\n)*)", re.MULTILINE)


def shown_commands():
    texts = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
    texts |= {f"help of {name}": inspect.cleandoc(recipe.details) for name, recipe in RECIPES.items()}
    texts |= {f"help of {name}": inspect.getdoc(command) for name, (_, command) in COMMANDS.items()}
    for place, text in texts.items():
        for program, line in SHOWN.findall(text):
            arguments = [one for one in shlex.split(line.replace("\\\n", " ")) if one != "..."]
            if program != "pytest":
                yield pytest.param(program, arguments, id=f"{place}: {program} {' '.join(arguments)}")


class Understood(BaseException):
    """Raised where a program has read its command line, before it does what it says."""


@pytest.fixture
def nothing_but_parsing(monkeypatch):
    def stopping_after(parse):
        def parse_and_stop(*args, **options):
            parsed = parse(*args, **options)
            if list(vars(parsed)) == ["name"]:  # a benchmark's, which reads its options itself
                return parsed
            raise Understood

        return parse_and_stop

    monkeypatch.setattr(tyro, "cli", stopping_after(tyro.cli))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stopping_after(argparse.ArgumentParser.parse_args))


@pytest.mark.usefixtures("nothing_but_parsing")
@pytest.mark.parametrize(("program", "arguments"), list(shown_commands()))
def test_a_documented_command_is_understood(program, arguments):
    with pytest.raises(Understood):
        PROGRAMS[program](arguments)

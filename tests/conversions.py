"""Runs `python -m convert` in this process."""

import json

from convert.command_line import main
from paths import TESTS

FIXTURES = TESTS / "fixtures"
SAIL = FIXTURES / "sail_checkpoint_legacy.pth.tar"


def run(*arguments):
    return main([str(argument) for argument in arguments])


def report_of(folder):
    """The report that a conversion wrote beside the model."""
    return json.loads((folder / "report.json").read_text())

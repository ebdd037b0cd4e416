"""The command that measures the input pipeline."""

import re
import subprocess
import sys

import pytest

from paths import ROOT
from train.command_line import main

SMALL = ["--source", "synthetic", "--synthetic-examples", "64", "--image-size", "32", "--batch-size", "8"]


def test_it_prints_a_rate_for_every_round(capsys):
    assert main(["throughput", *SMALL, "--rounds", "2", "--batches", "1"]) == 0
    first, second, *rounds = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"64 images, 0 worker processes on \d+ cores", first)
    assert re.fullmatch("(nvImageCodec|Pillow) decodes JPEGs, (cykooz-resizer|Pillow) resizes", second)
    assert len(rounds) == 2
    assert all(re.fullmatch(r" *\d+ images/s +\d+\.\d ms a batch", line) for line in rounds)


@pytest.mark.slow
def test_the_benchmark_program_answers_every_line():
    command = [sys.executable, "-m", "benchmarks.input_peers.ours", *SMALL]
    done = subprocess.run(command, cwd=ROOT, input="1\n2\n", capture_output=True, text=True, timeout=120, check=True)
    versions, *answers = done.stdout.splitlines()
    assert "grain" in versions
    assert answers == ["done", "done"]

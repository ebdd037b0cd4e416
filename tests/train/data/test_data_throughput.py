"""The command that measures the input pipeline: what it prints, and what it says when it cannot."""

import os
import re
import subprocess
import sys

import pytest

from paths import ROOT

SMALL = ["--source", "synthetic", "--synthetic-examples", "64", "--image-size", "32", "--batch-size", "8"]

WHO = "(nvImageCodec|Pillow) decodes JPEGs, (cykooz-resizer|Pillow) resizes"


def run(*arguments, module="train.commands.throughput", answers=None):
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, input=answers, capture_output=True, text=True, timeout=120, check=False
    )


def test_it_prints_a_rate_for_every_round():
    done = run(*SMALL, "--rounds", "2", "--batches", "1")
    assert (done.returncode, done.stderr) == (0, "")
    first, second, *rounds = done.stdout.splitlines()
    assert re.fullmatch(r"64 images, 0 worker processes on \d+ cores", first)
    assert re.fullmatch(WHO, second)
    assert len(rounds) == 2
    assert all(re.fullmatch(r" *\d+ images/s +\d+\.\d ms a batch", line) for line in rounds)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot keep a process to some cores")
def test_it_counts_the_cores_it_may_use_and_not_the_machines():
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})  # what a process starts has the cores of its parent
    try:
        done = run(*SMALL, "--rounds", "0")
    finally:
        os.sched_setaffinity(0, allowed)
    assert re.fullmatch(rf"64 images, 0 worker processes on 1 cores\n{WHO}\n", done.stdout)


def test_beside_its_peers_it_answers_every_line():
    done = run(*SMALL, module="benchmarks.input_peers.ours", answers="1\n2\n")
    assert done.returncode == 0
    versions, *answers = done.stdout.splitlines()
    assert "grain" in versions
    assert answers == ["done", "done"]


def test_a_data_set_that_is_not_there_is_one_line():
    done = run("--source", "folder:/nowhere/at/all")
    assert done.returncode == 1
    assert done.stderr == "error: folder:/nowhere/at/all: there is no folder /nowhere/at/all.\n"

"""The examples of docs/inference.md print what the guide shows."""

import doctest
import os
import shutil
import subprocess
import sys

import pytest

from paths import ROOT
from poolformer_jax import PoolFormerConfig
from poolformer_jax.weights import save_pretrained
from small_networks import IMAGES, PROCESSOR, random_variables

GUIDE = ROOT / "docs" / "inference.md"


@pytest.fixture
def folder_with_a_model(tmp_path, monkeypatch):
    """The files that the examples name: photographs and "model"."""
    config = PoolFormerConfig(depths=(1, 1, 1, 1), hidden_sizes=(8, 8, 16, 16), num_labels=4)
    save_pretrained(tmp_path / "model", *random_variables(config), image_processor=PROCESSOR)
    for name in ("chelsea.jpg", "coffee.jpg", "rocket.jpg"):
        shutil.copy(IMAGES / name, tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("folder_with_a_model")
def test_the_examples_print_what_the_guide_shows():
    result = doctest.testfile(str(GUIDE), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 40
    assert result.failed == 0


@pytest.mark.slow
@pytest.mark.usefixtures("folder_with_a_model")
def test_the_program_that_serves_from_several_processes_runs(tmp_path):
    section = GUIDE.read_text().partition("**Several processes.**")[2]
    (tmp_path / "serve.py").write_text(section.partition("```python\n")[2].partition("```")[0])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "serve.py"], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("['class ")

"""Images and a model for the commands, and a doctor that compiles nothing."""

import numpy as np
import pytest
from PIL import Image

from evaluations import write_model
from train.commands import doctor
from train.commands.finding import Finding


@pytest.fixture
def folder(tmp_path):
    """Class folders with two classes and two splits."""
    for split in ("train", "validation"):
        for name in ("cat", "dog"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(8):
                pixels = np.random.default_rng(number).integers(0, 255, (20, 20, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{number}.png")
    return tmp_path / "data"


@pytest.fixture
def compiled_step():
    """For tests of the compiled training step."""


@pytest.fixture
def only_requested_steps_are_compiled(request, monkeypatch):
    if "compiled_step" not in request.fixturenames:
        monkeypatch.setattr(doctor, "check_device_memory", lambda *_: Finding("fine", "device memory", "not compiled"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"), ("ant", "bee", "cat"))

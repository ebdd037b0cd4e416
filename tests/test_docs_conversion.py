"""Every command and every example of docs/conversion.md runs as it is written there."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from convert.command_line import main
from poolformer_jax.torch_weights.names import LAYOUTS

GUIDE = (Path(__file__).parent.parent / "docs" / "conversion.md").read_text(encoding="utf-8")
FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def named_files(tmp_path, monkeypatch):
    """A folder with what the guide names. A folder comes before a name on the Hub, so that nobody is asked."""
    for name in ("sail/poolformer_s12", "timm/poolformer_m48.sail_in1k", "runs/digits/model"):
        shutil.copytree(FIXTURES / "hf_sharded", tmp_path / name)
    for name in ("poolformer_s24.pth.tar", "poolformer_m48.pth.tar"):
        shutil.copy(FIXTURES / "sail_checkpoint_legacy.pth.tar", tmp_path / name)
    shutil.copy(FIXTURES / "timm_checkpoint.pth.tar", tmp_path / "checkpoint.pth.tar")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("named_files")
def test_the_commands_run():
    commands = re.findall(r"^python -m convert (.*?)(?:#.*)?$", GUIDE, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        assert main(shlex.split(command)) == 0
    assert {path.name for path in Path("for-transformers").iterdir()} >= {"model.safetensors", "report.json"}


@pytest.mark.usefixtures("named_files")
def test_the_python_examples_run():
    blocks = [block for block in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL) if "torch.load" not in block]
    assert len(blocks) == 2
    names = {"pixel_values": np.ones((1, 64, 64, 3), np.float32)}
    for block in blocks:
        exec(block, names)
    assert names["model"].config.num_labels == 37
    assert Path("my-model/model.safetensors").is_file()


def test_the_layouts_of_the_guide_are_those_there_are():
    assert set(re.findall(r"^\| `(\w+)` \| `model", GUIDE, re.MULTILINE)) == set(LAYOUTS)

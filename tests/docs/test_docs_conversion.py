"""The commands and examples of docs/conversion.md run."""

import re
import shlex
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from convert.command_line import main
from golden import published
from paths import ROOT, TESTS
from poolformer_jax import WeightsMismatch, from_torch_state_dict, to_torch_state_dict
from poolformer_jax.weights import LAYOUTS, open_weights, write_torch
from small_networks import CONFIG, MODEL, VARIABLES

GUIDE = (ROOT / "docs" / "conversion.md").read_text(encoding="utf-8")
FIXTURES = TESTS / "fixtures"


@pytest.fixture
def named_files(tmp_path, monkeypatch):
    """The files that the guide names. A local folder takes precedence over a name on the Hub."""
    for name in ("sail/poolformer_s12", "timm/poolformer_m48.sail_in1k", "runs/digits/model"):
        shutil.copytree(FIXTURES / "hf_sharded", tmp_path / name)
    for name in ("poolformer_s24.pth.tar", "poolformer_m48.pth.tar"):
        shutil.copy(FIXTURES / "sail_checkpoint_legacy.pth.tar", tmp_path / name)
    shutil.copy(FIXTURES / "timm_checkpoint.pth.tar", tmp_path / "checkpoint.pth.tar")
    write_detector(tmp_path / "retinanet_poolformer_s12.pth")
    caformer = published.state_dict("family/sail", "caformer_tiny")
    for name in ("timm/caformer_s18.sail_in22k_ft_in1k/model.pth", "sail/dl/caformer/caformer_s18_384.pth"):
        (tmp_path / name).parent.mkdir(parents=True)
        write_torch(tmp_path / name, [(key, array.shape) for key, array in caformer.items()], caformer.values())
    monkeypatch.chdir(tmp_path)


def write_detector(path):
    """A backbone and other arrays, with the names of the authors' detectors (models/poolformer.py, fork_feat)."""
    state_dict = to_torch_state_dict(CONFIG, VARIABLES, "sail")
    network = [name for name in state_dict if not name.startswith(("norm.", "head."))]
    arrays = {f"backbone.{name}": state_dict[name] for name in network}
    for place, channels in zip((0, 2, 4, 6), CONFIG.hidden_sizes, strict=True):
        arrays |= {f"backbone.norm{place}.{name}": np.ones(channels, np.float32) for name in ("weight", "bias")}
    arrays |= {
        "neck.lateral_convs.0.conv.weight": np.ones((4, 8, 1, 1), np.float32),
        "bbox_head.retina_cls.weight": np.ones((9, 4, 3, 3), np.float32),
    }
    write_torch(path, [(name, array.shape) for name, array in arrays.items()], arrays.values())


@pytest.mark.usefixtures("named_files")
def test_the_commands_run():
    commands = re.findall(r"^python -m convert (.*?)(?:#.*)?$", GUIDE, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        assert main(shlex.split(command)) == 0
    assert {path.name for path in Path("for-transformers").iterdir()} >= {"model.safetensors", "report.json"}


@pytest.mark.slow
@pytest.mark.usefixtures("named_files")
def test_the_python_examples_run():
    blocks = [block for block in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL) if "torch.load" not in block]
    assert len(blocks) == 3
    names = {"pixel_values": np.ones((1, 64, 64, 3), np.float32)}
    for block in blocks:
        exec(block, names)
    assert names["model"].config.num_labels == 37
    assert Path("my-model/flax_model.safetensors").is_file()
    exact = jax.jit(MODEL.apply)(VARIABLES, names["pixel_values"]).hidden_states
    for found, expected in zip(names["feature_maps"], exact, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.usefixtures("named_files")
def test_other_arrays_of_a_detector_are_an_error_that_names_them():
    with pytest.raises(WeightsMismatch, match=r"(?s)unexpected: norm0\.weight.*neck\..*bbox_head\."):
        from_torch_state_dict(open_weights("retinanet_poolformer_s12.pth").tensors)


def test_the_guide_lists_all_layouts():
    assert set(re.findall(r"^\| `(\w+)` \| `(?:flax_)?model", GUIDE, re.MULTILINE)) == set(LAYOUTS)

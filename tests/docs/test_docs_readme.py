"""The README's example runs."""

import re
import shutil

import pytest

from paths import ROOT
from poolformer_jax.weights import save_pretrained
from small_networks import CONFIG, IMAGES, LABELS, MODEL, PROCESSOR, VARIABLES

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def named_files(tmp_path, monkeypatch):
    """The files that the example names. A local folder takes precedence over a name on the Hub."""
    for name in ("sail/poolformer_s12", "timm/poolformer_m36.sail_in1k"):
        save_pretrained(tmp_path / name, MODEL, VARIABLES, image_processor=PROCESSOR)
    shutil.copy(IMAGES / "chelsea.jpg", tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("named_files")
def test_the_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(example, names)
    *ranked, label = capsys.readouterr().out.splitlines()
    assert len(ranked) == 5 and ranked[0].startswith(f"{label}: ")
    assert label in LABELS.values()
    assert len(names["output"].hidden_states) == len(CONFIG.depths)

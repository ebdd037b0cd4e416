"""`python -m train show` writes what the first training step sees."""

import numpy as np
from PIL import Image

from small_data import take
from train.command_line import main
from train.commands import show
from train.commands.show import show_batch
from train.data import open_source
from training import class_folders, tiny


def test_the_sheet_has_the_pictures_and_targets_of_the_first_step(tmp_path, monkeypatch):
    class_folders(tmp_path / "images", 12)
    config = tiny(tmp_path / "run", data__source=f"folder:{tmp_path / 'images'}", data__batch_size=8)
    drawn = []
    monkeypatch.setattr(show, "draw", lambda *given: drawn.append(given))
    assert show_batch(config) == tmp_path / "run" / "augmented.png"
    ((_, _, pictures, captions),) = drawn
    assert len(pictures) == len(captions) == 8
    source = open_source(config.data, "train")
    (batch,) = take(config.data, source, 1)
    for picture, pixels, label, caption in zip(pictures, batch["image"], batch["label"], captions):
        np.testing.assert_array_equal(picture, pixels)
        assert caption == [(source.class_names[label], "93%")]  # smoothed by 0.1 over three classes


def test_the_command_writes_the_sheet(tmp_path, capsys):
    assert main(["show", "digits", "--run-dir", str(tmp_path), "--data.batch-size", "12"]) == 0
    with Image.open(tmp_path / "augmented.png") as sheet:
        assert np.asarray(sheet).std() > 10
    assert "augmented.png" in capsys.readouterr().out

"""A conversion overwrites nothing without being asked, and a failed one writes no folder."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from conversions import FIXTURES, SAIL, run
from paths import ROOT
from poolformer_jax.weights import open_weights


def test_mismatched_names_are_reported_and_no_folder_is_written(tmp_path, capsys):
    arrays = {name: np.asarray(tensor) for name, tensor in open_weights(FIXTURES / "hf.bin").tensors.items()}
    arrays["norm.wieght"] = arrays.pop("norm.weight")
    safetensors.numpy.save_file(arrays, tmp_path / "wrong.safetensors")
    report = tmp_path / "reports" / "wrong.json"
    assert run(tmp_path / "wrong.safetensors", tmp_path / "model", "--report", report) == 1
    assert "missing: norm.weight [8]; the nearest name on the other side is norm.wieght" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
    written = json.loads(report.read_text())
    assert (written["missing"], written["unexpected"]) == (
        [{"name": "norm.weight", "shape": [8]}],
        [{"name": "norm.wieght", "shape": [8]}],
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("whole_model.bin", "Nothing was run"),
        ("hf_backbone.bin", "backbone without final norm and head"),
        ("nothing.pth", "There is no model at"),
    ],
)
def test_a_failed_conversion_prints_one_message_and_writes_no_folder(tmp_path, capsys, source, message):
    assert run(FIXTURES / source, tmp_path / "model") == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("destination", "message"),
    [
        ("/proc/nowhere", "Cannot write /proc/nowhere: No such file or directory"),
        ("{folder}/file/model", "Cannot write {folder}/file/model: File exists"),
        ("{folder}/file/deeper/model", "Cannot write {folder}/file/deeper/model: Not a directory"),
        ("{folder}/model.onnx", "{folder}/model.onnx looks like the name of a file. Expected that of a folder"),
    ],
)
def test_a_destination_that_cannot_be_written_is_named(tmp_path, capsys, destination, message):
    (tmp_path / "file").write_text("not a folder")
    assert run(FIXTURES / "hf.bin", destination.format(folder=tmp_path)) == 1
    assert capsys.readouterr().err.startswith(f"error: {message.format(folder=tmp_path)}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("layout", ["jax", "sail"])
def test_a_full_disk_is_reported_with_the_folder_and_leaves_nothing(tmp_path, layout):
    # Files are limited to two kilobytes, enough for the preprocessing and too little for the weights.
    model = tmp_path / "model"
    command = f"ulimit -f 2; exec {sys.executable} -B -m convert {FIXTURES / 'hf.bin'} {model} --to {layout}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: Cannot write {model}: File too large")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json", "model-00001-of-00002.safetensors"])
def test_a_report_does_not_overwrite_the_source(tmp_path, capsys, name):
    source = tmp_path / "source"
    shutil.copytree(FIXTURES / "hf_sharded", source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    assert name in before
    assert run(source, tmp_path / "model", "--report", source / "." / name) == 1
    assert "is a file of the source. Expected another name" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in source.iterdir()} and not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "name", [*(f"model/{name}" for name in ("flax_model.safetensors", "config.json", "README.md")), "model"]
)
def test_a_report_does_not_overwrite_the_model(tmp_path, capsys, name):
    assert run(FIXTURES / "hf.bin", tmp_path / "model", "--report", tmp_path / name) == 1
    assert "would overwrite the model. Expected another name" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_a_model_is_replaced_only_on_request(tmp_path, capsys):
    arguments = (FIXTURES / "hf.bin", tmp_path / "model")
    assert run(SAIL, tmp_path / "model") == 0
    before = (tmp_path / "model" / "flax_model.safetensors").read_bytes()
    assert run(*arguments) == 1
    assert "model already has a model (flax_model.safetensors). Expected a new folder, or --overwrite" in (
        capsys.readouterr().err
    )
    assert (tmp_path / "model" / "flax_model.safetensors").read_bytes() == before
    assert run(*arguments, "--overwrite") == 0
    assert (tmp_path / "model" / "flax_model.safetensors").read_bytes() != before
    assert run(tmp_path / "model", tmp_path / "model", "--overwrite") == 1
    assert "is the source's own folder" in capsys.readouterr().err


def test_a_kill_between_model_and_report_leaves_no_report_of_the_old_model(tmp_path, monkeypatch):
    model = tmp_path / "model"
    assert run(SAIL, model) == 0
    before = (model / "flax_model.safetensors").read_bytes()
    monkeypatch.setattr("convert.command_line.write_json", interrupted)
    assert run(FIXTURES / "hf.bin", model, "--overwrite") == 130
    assert (model / "flax_model.safetensors").read_bytes() != before
    assert not (model / "report.json").exists()


def interrupted(*_):
    raise KeyboardInterrupt

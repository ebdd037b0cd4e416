"""The main job: one command trains on real scans, and its model folder classifies an ordinary picture."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

import programs
from poolformer_jax import load_pretrained
from poolformer_jax.cli import main as classify
from train.command_line import main


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """The folder of a short run: a small network, a tenth of the recipe's epochs, unmoved digits."""
    run_dir = tmp_path_factory.mktemp("digits") / "run"
    short = ["--optimizer.epochs", "4", "--optimizer.warmup-epochs", "1", "--distributed.mode", "off"]
    small = ["--model.depths", "1", "1", "--model.hidden-sizes", "16", "32", "--data.batch-size", "32"]
    unmoved = ["--data.augment.max-rotation", "0", "--data.augment.max-shift", "0"]
    arguments = [*short, *small, *unmoved, "--optimizer.learning-rate", "0.02"]
    assert main(["--run-dir", str(run_dir), *arguments]) == 0
    return run_dir


@pytest.mark.slow
def test_a_short_run_recognises_most_held_out_digits(run_dir):
    report = json.loads((run_dir / "model" / "evaluation.json").read_text())
    # A fifth of 1,797 scans, rounded in every class.
    assert report["examples"] == 359
    assert report["top1"] >= 0.5  # of ten classes; the slow test below demands 0.98


def test_the_model_folder_opens_with_its_class_names(run_dir):
    model, variables = load_pretrained(run_dir / "model")
    assert dict(model.config.id2label) == {label: str(label) for label in range(10)}
    assert variables["params"]["head"]["bias"].shape == (10,)


def test_evaluate_gives_the_figures_of_the_run(run_dir, tmp_path, capsys):
    arguments = ["evaluate", str(run_dir / "model"), "--data", "digits", "--batch-size", "104"]
    assert main([*arguments, "--output", str(tmp_path), "--distributed.mode", "off"]) == 0
    before = json.loads((run_dir / "model" / "evaluation.json").read_text())
    after = json.loads((tmp_path / "evaluation.json").read_text())
    assert after["classes"] == before["classes"]
    assert (after["top1"], after["top5"]) == (before["top1"], before["top5"])
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
    assert f"top-1 {after['top1']:.2%}" in capsys.readouterr().out
    assert (tmp_path / "confusion.png").exists()


@pytest.mark.slow
def test_a_trained_model_is_fine_tuned_to_new_classes_at_a_higher_resolution(run_dir, tmp_path, capsys):
    arguments = [
        *("finetune", "--run-dir", str(tmp_path), "--model.source", str(run_dir / "model")),
        *("--data.source", "synthetic", "--data.synthetic-examples", "64", "--data.workers", "0"),
        *("--data.image-size", "48", "--data.image-mean", "0.5", "--data.image-std", "0.25", "--data.batch-size", "32"),
        *("--optimizer.epochs", "2", "--distributed.mode", "off"),
    ]
    assert main(arguments) == 0
    assert "Held-out accuracy" in capsys.readouterr().out
    model, _ = load_pretrained(tmp_path / "model")
    assert model.config.id2label[1] == "18 degrees"


@pytest.mark.slow
def test_the_recipe_recognises_98_percent_and_the_command_it_prints_classifies_a_picture(tmp_path, capsys, optimised):
    # What a user runs: with the usual code generator.
    output = programs.run(["--run-dir", str(tmp_path / "run")], XLA_FLAGS="")
    report = json.loads((tmp_path / "run" / "model" / "evaluation.json").read_text())
    assert report["top1"] >= 0.98
    assert f"Held-out accuracy {report['top1']:.2%}" in output

    (line,) = [line for line in output.splitlines() if " -m poolformer_jax predict " in line]
    command = shlex.split(line)
    assert Path(shutil.which(command[0]) or "").samefile(sys.executable)
    assert classify(command[3:]) == 0
    printed = capsys.readouterr().out
    best = re.search(r"([\d.]+) %\s+(\d)", printed)
    assert best is not None, printed
    assert best[2] == Path(command[4]).name[0]
    assert float(best[1]) > 50

"""The main job: one command trains on real scans, and its model folder classifies an ordinary picture."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import programs
from poolformer_jax import load_pretrained


@pytest.fixture(scope="module")
def run(tmp_path_factory, optimised) -> tuple[Path, str]:
    """The folder that `python -m train` leaves, and what it prints; nothing but the folder is changed."""
    run_dir = tmp_path_factory.mktemp("digits") / "run"
    return run_dir, programs.run(["--run-dir", str(run_dir)])


def test_held_out_digits_are_recognised(run):
    run_dir, output = run
    report = json.loads((run_dir / "model" / "evaluation.json").read_text())
    # A fifth of 1,797 scans, rounded in every class.
    assert report["examples"] == 359
    assert report["top1"] >= 0.98
    assert f"Held-out accuracy {report['top1']:.2%}" in output


def test_the_command_it_prints_classifies_a_picture(run):
    _, output = run
    (line,) = [line for line in output.splitlines() if " -m poolformer_jax predict " in line]
    command = shlex.split(line)
    assert Path(shutil.which(command[0]) or "").samefile(sys.executable)
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    told = subprocess.run(
        command, cwd=programs.ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    digit = Path(command[4]).name[0]
    best = re.search(r"([\d.]+) %\s+(\d)", told)
    assert best is not None, told
    assert best[2] == digit
    assert float(best[1]) > 50


def test_the_model_folder_opens_with_its_class_names(run):
    run_dir, _ = run
    model, variables = load_pretrained(run_dir / "model")
    assert dict(model.config.id2label) == {label: str(label) for label in range(10)}
    assert variables["params"]["head"]["bias"].shape == (10,)


def test_evaluate_gives_the_figures_of_the_run(run, tmp_path):
    run_dir, _ = run
    arguments = ["evaluate", str(run_dir / "model"), "--data", "digits", "--batch-size", "100"]
    output = programs.run([*arguments, "--output", str(tmp_path)], devices=2)
    before = json.loads((run_dir / "model" / "evaluation.json").read_text())
    after = json.loads((tmp_path / "evaluation.json").read_text())
    assert after["classes"] == before["classes"]
    assert (after["top1"], after["top5"]) == (before["top1"], before["top5"])
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
    assert f"top-1 {after['top1']:.2%}" in output
    assert (tmp_path / "confusion.png").exists()


def test_a_trained_model_is_fine_tuned_to_new_classes_at_a_higher_resolution(run, tmp_path):
    run_dir, _ = run
    arguments = [
        *(
            "finetune",
            "--run-dir",
            str(tmp_path),
            "--model.source",
            str(run_dir / "model"),
            "--data.source",
            "synthetic",
        ),
        *("--data.image-size", "48", "--data.image-mean", "0.5", "--data.image-std", "0.25", "--data.batch-size", "32"),
        *("--data.synthetic-examples", "64", "--data.workers", "0", "--optimizer.epochs", "2"),
    ]
    assert "Held-out accuracy" in programs.run(arguments)
    model, _ = load_pretrained(tmp_path / "model")
    assert model.config.id2label[1] == "18 degrees"

"""`python -m train probe`: a head fitted to features that are computed once."""

import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from poolformer_jax import PoolFormerConfig, PoolFormerImageProcessor, load_pretrained, save_pretrained
from small_networks import random_variables
from train.command_line import main
from train.commands.evaluate import run_evaluation
from train.commands.evaluate_config import EvaluateConfig
from train.commands.probe import fit_linear
from training import ALONE


@pytest.mark.parametrize("classes", [(0, 1, 3), (1, 2)])
def test_the_head_is_the_logistic_regression_of_standardized_features(classes):
    rng = np.random.default_rng(0)
    features, labels = rng.normal(5, 3, (60, 4)), rng.choice(classes, 60)
    kernel, bias = fit_linear(features, labels, 4, regularization=0.5)
    scaler = StandardScaler().fit(features)
    fitted = LogisticRegression(C=0.5, max_iter=2000).fit(scaler.transform(features), labels)
    logits = features @ kernel + bias
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = np.zeros((60, 4))
    expected[:, classes] = fitted.predict_proba(scaler.transform(features))
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """A probe of an untrained network with an MLP head on pictures of three colours, one of them damaged."""
    root = tmp_path_factory.mktemp("probe")
    for number, name in enumerate(("ant", "bee", "cat")):
        (root / "data" / name).mkdir(parents=True)
        for index in range(20):
            pixels = np.random.default_rng(index).integers(0, 60, (16, 16, 3)) + 90 * np.eye(3, dtype=int)[number]
            Image.fromarray(pixels.astype(np.uint8)).save(root / "data" / name / f"{index}.png")
    (root / "data" / "ant" / "0.png").write_bytes(b"not an image")
    config = PoolFormerConfig(depths=(1,) * 4, hidden_sizes=(4, 6, 8, 10), head="mlp", num_labels=7)
    processor = PoolFormerImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, crop_pct=None, image_mean=(0.5,) * 3
    )
    save_pretrained(root / "model", *random_variables(config), image_processor=processor)
    given = ["probe", str(root / "model"), "--data", f"folder:{root / 'data'}", "--held-out", "0.25"]
    assert main([*given, "--neighbors", "3", "--output", str(root / "out")]) == 0
    return root


def test_a_probe_separates_colours_and_leaves_out_a_damaged_image(probed, capsys):
    report = json.loads((probed / "out" / "evaluation.json").read_text())
    assert 14 <= report["examples"] <= 15
    assert report["top1"] > 0.9
    assert {"calibration_error", "f1"} < report.keys()
    assert (probed / "out" / "report.html").exists()


@pytest.mark.slow  # compiles an evaluation
def test_the_probe_is_a_model_with_the_same_score(probed):
    model, _ = load_pretrained(probed / "out")
    assert list(model.config.id2label.values()) == ["ant", "bee", "cat"]
    config = EvaluateConfig(
        str(probed / "out"),
        f"folder:{probed / 'data'}",
        split="validation",
        held_out=0.25,
        batch_size=16,
        workers=0,
        on_bad_image="skip",
        distributed=ALONE,
    )
    found = run_evaluation(config, Console(quiet=True))
    report = json.loads((probed / "out" / "evaluation.json").read_text())
    assert (found.examples, found.top1) == (report["examples"], report["top1"])
    assert found.loss == pytest.approx(report["loss"], rel=1e-3, abs=1e-4)


def test_a_single_class_is_refused(probed, tmp_path, capsys):
    (tmp_path / "ant").mkdir()
    for index in range(1, 6):
        (tmp_path / "ant" / f"{index}.png").write_bytes((probed / "data" / "ant" / f"{index}.png").read_bytes())
    assert main(["probe", str(probed / "model"), "--data", f"folder:{tmp_path}"]) == 1
    assert "one class" in " ".join(capsys.readouterr().err.split())

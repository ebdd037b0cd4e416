"""What a report says of predictions: calibration, classes, mistakes, and the files that show them."""

import csv
import dataclasses
import html
import json
import re
import sys
import types

import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

from poolformer_jax.errors import MissingDependencyError
from train.compute.evaluation import Evaluation, Predictions
from train.data import ArraySource
from train.report.analysis import (
    calibration_error,
    class_scores,
    confident_mistakes,
    fit_temperature,
    measure_calibration,
)
from train.report.page import write_report_files
from train.report.results import evaluation_report
from train.report.trackers import open_trackers
from training import tiny


def as_predictions(logits, labels, index=None):
    index = np.arange(len(labels)) if index is None else np.array(index)
    return Predictions(index, np.array(labels, np.int32), np.array(logits, np.float32))


@pytest.fixture(scope="module")
def overconfident():
    """4,000 answers of five classes drawn from their own probabilities, and logits three times too large."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, (4000, 5))
    labels = [rng.choice(5, p=row) for row in softmax(logits, axis=1)]
    return as_predictions(3 * logits, labels)


def test_the_calibration_error_is_the_mean_gap_of_bins():
    # Two bins: answers of 0.9 of which half are right, and one of 0.6 that is right.
    probabilities = np.array([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4]])
    assert calibration_error(probabilities, np.array([0, 0, 0])) == pytest.approx((2 * 0.4 + 0.4) / 3)


def test_the_temperature_of_logits_that_are_three_times_too_large_is_three(overconfident):
    found = measure_calibration(overconfident)
    assert found.temperature == pytest.approx(3, rel=0.05)
    assert found.error > 0.15
    assert found.error_after < 0.02


def test_each_half_is_measured_with_the_temperature_of_the_other():
    # In the even half every confident answer is right, in the odd half none is.
    logits = np.tile([[2.0, 0.0]], (8, 1))
    labels = [0, 1] * 4
    even, odd = (fit_temperature(logits[half::2], np.array(labels[half::2])) for half in (0, 1))
    assert even < 0.1
    assert odd > 10
    confidence = softmax(logits[:1] / [[odd], [even]], axis=1)[:, 0]
    found = measure_calibration(as_predictions(logits, labels))
    assert found.error_after == pytest.approx((1 - confidence[0]) / 2 + confidence[1] / 2)


def test_scores_of_a_class_without_answers_or_images_are_not_defined():
    scores = class_scores(as_predictions([[3, 0, 0], [2, 1, 0], [0, 1, 0]], [0, 1, 1]))
    assert scores[0] == {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3)}
    assert scores[1] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3)}
    assert scores[2] == {"precision": None, "recall": None, "f1": None}


def test_mistakes_are_listed_by_confidence():
    found = as_predictions([[1, 0], [5, 0], [3, 0], [9, 0]], [1, 1, 1, 0])
    assert confident_mistakes(found, 2).tolist() == [1, 2]


NAMES = ("<script>alert(1)</script>", "$x_{", "caf\udce9")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The files of a report on four images, of which two are answered wrongly, and the source."""
    folder = tmp_path_factory.mktemp("report")
    source = ArraySource(np.zeros((5, 8, 8), np.uint8), np.array([0, 1, 2, 0, 1]), tuple("abcde"), NAMES)
    # Image 2 could not be read.
    predictions = as_predictions([[3, 0, 0], [2, 0, 0], [1, 0, 0], [0, 0, 4]], [0, 1, 0, 1], index=[0, 1, 3, 4])
    confusion = np.array([[2, 0, 0], [1, 0, 1], [0, 0, 0]])
    counts = confusion.sum(1), confusion.diagonal(), confusion.sum(0), confusion
    evaluation = Evaluation(4, 0.5, 0.5, 1.0, *counts, predictions)
    write_report_files(folder, "Model & <data>", evaluation, evaluation_report(evaluation, NAMES), source)
    return folder, evaluation, source


def test_the_page_is_self_contained_and_escapes_names(written):
    folder, _, _ = written
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    assert html.escape(NAMES[0]) in page
    assert "Model &amp; &lt;data&gt;" in page
    sources = re.findall(r'(?:src|href)="([^"]{20})', page)
    assert sources == ["data:image/png;base64"[:20]] * 2  # the confusion and the mistakes; there are no curves here
    for name in ("confusion.png", "mistakes.png"):
        with Image.open(folder / name) as picture:
            picture.verify()


def test_predictions_have_a_line_for_every_image_that_could_be_read(written):
    with (written[0] / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["index"], row["image"], row["correct"]) for row in rows] == [
        ("0", "a", "1"),
        ("1", "b", "0"),
        ("3", "d", "1"),
        ("4", "e", "0"),
    ]
    assert (rows[3]["class"], rows[3]["prediction"]) == ("$x_{", r"caf\xe9")
    assert float(rows[3]["probability"]) == pytest.approx(softmax([0, 0, 4])[2], abs=1e-6)


def test_a_sheet_of_an_earlier_evaluation_goes_if_there_are_no_mistakes(written, tmp_path):
    _, evaluation, source = written
    right = dataclasses.replace(evaluation.predictions, label=evaluation.predictions.logits.argmax(1))
    (tmp_path / "mistakes.png").touch()
    evaluation = dataclasses.replace(evaluation, predictions=right)
    write_report_files(tmp_path, "", evaluation, evaluation_report(evaluation, NAMES), source)
    assert not (tmp_path / "mistakes.png").exists()


def test_trackers_and_a_function_get_every_figure(tmp_path, monkeypatch):
    calls = []
    tracker = types.ModuleType("trackio")
    tracker.init = lambda **options: calls.append(options)
    tracker.log = lambda figures, step: calls.append((step, figures))
    tracker.finish = lambda: calls.append("finished")
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    mine = []
    with open_trackers(tiny(tmp_path / "mine", log_to=("trackio",)), lambda *line: mine.append(line)) as log:
        log(3, {"train/loss": 0.5})
    options, *rest = calls
    assert (options["name"], options["config"]["seed"], options["resume"]) == ("mine", 42, "allow")
    json.dumps(options["config"])
    assert rest == [(3, {"train/loss": 0.5}), "finished"]
    assert mine == [(3, {"train/loss": 0.5})]


def test_a_tracker_that_is_not_installed_is_named_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with (
        pytest.raises(MissingDependencyError, match=r"pip install -e '.\[train,wandb\]'"),
        open_trackers(tiny(tmp_path, log_to=("wandb",)), None),
    ):
        pass

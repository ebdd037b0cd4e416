"""Several classes per image, and regression: from a table of targets to a model and its figures."""

import csv
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.special import expit
from sklearn.metrics import (
    average_precision_score,
    mean_absolute_error,
    mean_squared_error,
    precision_recall_fscore_support,
    r2_score,
)

from poolformer_jax import load_pretrained
from poolformer_jax.errors import InputError
from small_data import assert_same, take
from train.command_line import main
from train.compute import Predictions
from train.compute.target_evaluation import evaluate_targets
from train.config import TrainConfig
from train.data import (
    ArraySource,
    DataConfig,
    DeviceAugmentation,
    HostAugmentation,
    SourceError,
    augment_batch,
    open_source,
)
from train.report.analysis import largest_errors
from train.report.page import write_report_files
from train.report.results import evaluation_report
from training import ONE_STAGE, OPTIMIZER, run, tiny

NO_MIX = DeviceAugmentation(mixup=0.0, cutmix=0.0, label_smoothing=0.0, erase_probability=0.0)
COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images with any of three colours, named in labels.jsonl, and how much of each there is in amounts.csv."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    lines, amounts = [], ["file_name,red,green"]
    for number in range(60):
        bright = rng.random(3) < 0.5
        pixel = np.where(bright, 220, 20) + rng.integers(0, 20, 3)
        Image.new("RGB", (16, 16), tuple(pixel.tolist())).save(root / f"{number:02d}.png")
        lines.append({"file_name": f"{number:02d}.png", "label": [c for c, there in zip(COLOURS, bright) if there]})
        amounts.append(f"{number:02d}.png,{pixel[0] / 255:.4f},{pixel[1] / 255:.4f}")
    (root / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = [f"{line['file_name']},{'|'.join(line['label'])}" for line in lines]
    (root / "labels.csv").write_text("\n".join(["file_name,label", *names]))
    hot = [f"{line['file_name']},{','.join(str(int(c in line['label'])) for c in COLOURS)}" for line in lines]
    (root / "columns.csv").write_text("\n".join([f"file_name,{','.join(COLOURS)}", *hot]))
    (root / "amounts.csv").write_text("\n".join(amounts))
    return root


def data(folder, file, problem="multi_label_classification", **changes):
    augment = HostAugmentation(crop="evaluation", randaugment="none")
    config = DataConfig(
        source=f"labels:{folder}/{file}",
        problem_type=problem,
        image_size=16,
        crop_pct=None,
        batch_size=16,
        workers=0,
        held_out=0.2,
        augment=augment,
        mix=NO_MIX,
    )
    return dataclasses.replace(config, **changes)


def test_lists_names_and_columns_give_the_same_targets(folder):
    sources = [
        open_source(data(folder, "labels.jsonl"), "train+validation"),
        open_source(data(folder, "labels.csv"), "train+validation"),
        open_source(data(folder, "columns.csv", label_column="blue,green,red"), "train+validation"),
    ]
    for source in sources:
        assert source.class_names == ("blue", "green", "red")  # sorted by name
        np.testing.assert_array_equal(source.labels, sources[0].labels)
    assert 0.3 < sources[0].labels.mean() < 0.7


def test_target_batches_are_the_same_on_any_number_of_processes(folder):
    config = data(folder, "amounts.csv", "regression", label_column="red,green")
    source = open_source(config, "train")
    alone = take(config, source, 4)
    assert (alone[0]["label"].dtype, alone[0]["label"].shape) == (np.float32, (16, 2))
    parts = [take(config, source, 4, process_index=p, process_count=2) for p in range(2)]
    assert_same(
        [{name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in zip(*parts)], alone
    )
    for batch in alone:
        np.testing.assert_array_equal(batch["label"], source.labels[batch["index"]])


def figures(problem, logits, targets):
    return evaluate_targets(problem, Predictions(np.arange(len(targets)), targets, logits))


def test_multi_label_figures_equal_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    targets = (rng.random((200, 7)) < 0.3).astype(np.float32)
    logits = np.round(rng.normal(size=(200, 7)) + targets, 1).astype(np.float32)  # with ties
    logits[:, 6] = -1  # a class that is never predicted
    found = figures("multi_label_classification", logits, targets)
    assert found.figures["map"] == pytest.approx(average_precision_score(targets, logits, average="macro"), abs=1e-12)
    scores = precision_recall_fscore_support(targets, logits > 0, zero_division=np.nan)
    assert found.figures["f1"] == pytest.approx(np.nanmean(scores[2]), abs=1e-12)
    for row, (precision, recall, f1, examples) in zip(found.targets[:6], zip(*scores)):
        assert (row["precision"], row["recall"], row["f1"]) == pytest.approx((precision, recall, f1), abs=1e-12)
        assert row["examples"] == examples
    assert (found.targets[6]["precision"], found.targets[6]["recall"]) == (None, 0)
    targets[:, 2] = 0  # a class without a positive has no average precision
    found = figures("multi_label_classification", logits, targets)
    assert (found.targets[2]["average_precision"], found.targets[2]["recall"]) == (None, None)
    others = np.delete(np.arange(7), 2)
    expected = average_precision_score(targets[:, others], logits[:, others], average="macro")
    assert found.figures["map"] == pytest.approx(expected, abs=1e-12)


def test_regression_figures_equal_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    targets = rng.normal(size=(50, 3)).astype(np.float32)
    numbers = (targets + rng.normal(size=(50, 3)) / 2).astype(np.float32)
    found = figures("regression", numbers, targets).figures
    squared = mean_squared_error(targets, numbers)
    expected = (squared, squared**0.5, mean_absolute_error(targets, numbers), r2_score(targets, numbers))
    assert (found["mse"], found["rmse"], found["mae"], found["r2"]) == pytest.approx(expected, rel=1e-6)
    targets[:, 0] = 1  # a number that does not vary has no R²
    found = figures("regression", numbers, targets)
    assert found.targets[0]["r2"] is None
    assert found.figures["r2"] == pytest.approx(r2_score(targets[:, 1:], numbers[:, 1:]), rel=1e-6)


@pytest.mark.parametrize(
    ("problem", "metric", "expected"),
    [
        ("multi_label_classification", "top1", "one of map, f1, loss"),
        ("regression", "map", "one of loss, mae, r2"),
        ("single_label_classification", "r2", "one of top1, loss, balanced-accuracy, f1"),
    ],
)
def test_metrics_of_other_targets_are_refused_with_those_that_fit(problem, metric, expected):
    chosen = tiny().data
    if problem != "single_label_classification":
        chosen = dataclasses.replace(chosen, source="labels:x.csv", problem_type=problem, mix=NO_MIX)
    with pytest.raises(InputError, match=f"keep_best='{metric}': expected {expected} with"):
        tiny(data=chosen, keep_best=metric)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_the_report_has_every_image_and_the_worst_mistakes(problem, tmp_path):
    rng = np.random.default_rng(0)
    several = problem == "multi_label_classification"
    targets = rng.random((5, 2)).astype(np.float32).round(int(not several) * 3)
    source = ArraySource(np.zeros((6, 8, 8), np.uint8), np.zeros(6, int), tuple("abcdef"), ("red", "<b>"))
    logits = (8 * targets - 4 if several else targets).astype(np.float32)
    logits[3, 1] = 2 if several else 9
    targets[3, 1] = 0
    index = np.array([0, 1, 2, 3, 5])
    evaluation = evaluate_targets(problem, Predictions(index, targets, logits))
    report = evaluation_report(evaluation, source.class_names)
    write_report_files(tmp_path, "Targets", evaluation, report, source)
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["a", "b", "c", "d", "f"]
    assert float(rows[3]["<b> prediction"]) == pytest.approx(expit(2) if several else 9, rel=1e-4)
    assert (float(rows[3]["<b>"]), float(rows[0]["red"])) == (0, pytest.approx(targets[0, 0]))
    worst = largest_errors(expit(logits) if several else logits, targets, np.ones(2), 3, 0.5)
    assert worst == {3: 1}
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png") == (1 if several else 2)
    assert (tmp_path / "scatter.png").exists() != several
    assert "&lt;b&gt;" in page
    assert "Calibration error" not in page


def test_mixing_and_smoothing_change_targets_as_they_change_images():
    config = dataclasses.replace(
        tiny().data,
        source="labels:x.csv",
        problem_type="multi_label_classification",
        mix=dataclasses.replace(NO_MIX, mixup=1.0, label_smoothing=0.2, mix_group=2),
    )
    images = jnp.stack([jnp.zeros((4, 4, 1), jnp.uint8), jnp.full((4, 4, 1), 255, jnp.uint8)])
    labels = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    pixels, targets = augment_batch(jax.random.key(1), images, labels, config, num_classes=3)
    share = float(pixels[0].mean()) * 0.25 + 0.5  # of the second image in the first; undoes the normalisation
    np.testing.assert_allclose(targets[0], [0.1 + 0.8 * (1 - share), 0.1 + 0.8 * share, 0.1], atol=2e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mix": dataclasses.replace(NO_MIX, cutmix=1.0)}, "--data.mix.cutmix 0"),
        ({"mix": dataclasses.replace(NO_MIX, label_smoothing=0.1)}, "--data.mix.label-smoothing 0"),
        ({"source": "folder:x"}, "labels:FILE or parquet:PATH"),
        ({"sampling": "balanced"}, "an image has no single class"),
    ],
)
def test_what_regression_does_not_define_is_refused(folder, changes, message):
    with pytest.raises(InputError, match=message):
        data(folder, "amounts.csv", "regression", **changes)


def test_targets_that_are_not_numbers_are_refused(folder):
    with pytest.raises(SourceError, match=r"'file_name' holds '00.png'. Expected finite numbers"):
        open_source(data(folder, "amounts.csv", "regression", label_column="file_name"), "train")


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_a_run_learns_its_targets_and_evaluate_gives_its_figures(folder, tmp_path, problem, capsys):
    several = problem == "multi_label_classification"
    columns = "label" if several else "red,green"
    chosen = data(folder, "labels.csv" if several else "amounts.csv", problem, label_column=columns)
    optimizer = dataclasses.replace(OPTIMIZER, learning_rate=1e-2, epochs=30)
    network = dataclasses.replace(ONE_STAGE, drop_path_rate=0.0)
    config = TrainConfig(
        tmp_path / "run", network, chosen, optimizer, distributed=tiny().distributed, evaluate_every=30
    )
    outcome = run(config)
    found = outcome.evaluations["params"]
    assert found.figures["map"] > 0.9 if several else found.figures["mse"] < 0.03
    model, _ = load_pretrained(tmp_path / "run" / "model")
    assert model.config.problem_type == problem
    arguments = ["evaluate", str(tmp_path / "run" / "model"), "--data", chosen.source, "--label-column", columns]
    alone = ["--held-out", "0.2", "--workers", "0", "--distributed.mode", "off", "--output", str(tmp_path / "out")]
    assert main([*arguments, *alone]) == 0
    again = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    for name, value in found.summary().items():
        assert again[name] == pytest.approx(value, rel=1e-4)
    assert (tmp_path / "out" / "report.html").exists()

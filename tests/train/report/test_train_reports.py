"""Pictures, examples and reports of a run; an error in them does not end a run."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from small_data import photographs, write_photographs
from train.compute.evaluation import Evaluation
from train.data import ArraySource, open_source
from train.report import pictures
from train.report.journal import MetricsFile, last_logged_step
from train.report.pictures import draw, paint_confusion, paint_curves
from train.report.results import evaluation_report, write_examples
from train.report.summary import print_summary
from training import tiny

EVALUATION = Evaluation(
    4, 0.5, 0.75, 1.0, np.array([2, 2]), np.array([2, 1]), np.array([3, 1]), np.array([[2, 0], [1, 1]])
)


LINE = {"kind": "train", "step": 3, "epoch": 0.5, "loss": 1.0, "accuracy": None, "learning_rate": 0.1}
DAMAGED = ["", "{", "[]", "\xff", "null", "[" * 100_000, "[]," * 10_000, '{"kind": "train"}', '{"kind": [], "step": 1}']
DAMAGED += ['{"kind": "train", "step": null}', '{"kind": "train", "step": 1, "epoch": {}}', "1" * 5000]


@pytest.mark.parametrize("damaged", DAMAGED)
def test_a_damaged_line_of_the_metrics_is_left_out(tmp_path, caplog, damaged):
    path = tmp_path / "metrics.jsonl"
    text = f"{json.dumps(LINE)}\n{damaged}\n" + json.dumps(LINE | {"step": 6}) + '\n{"kind": "tr'
    path.write_text(text, encoding="latin-1")
    assert last_logged_step(tmp_path) == 6
    assert f"{path}: leaves out damaged lines, {2 if damaged else 1} of" in caplog.text or not damaged
    with MetricsFile(tmp_path, 3) as metrics:
        metrics.draw_curves()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [LINE]
    assert (tmp_path / "curves.png").is_file()


LINES = st.text(max_size=100).map(lambda text: json.dumps({"kind": text, "step": text}).encode())


@given(st.binary(max_size=200) | LINES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_may_stand_in_the_metrics(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_bytes(json.dumps(LINE).encode() + b"\n" + content)
    assert last_logged_step(tmp_path) >= 3


def test_examples_leave_out_images_that_cannot_be_read(tmp_path):
    root = write_photographs(tmp_path / "photos")
    source = open_source(photographs(root, held_out=0.5), "validation")
    damaged, missing, whole = (root / source.names[place].item().decode() for place in (0, len(source) - 1, 1))
    damaged.write_bytes(damaged.read_bytes()[:2000])
    missing.unlink()
    paths = write_examples(tmp_path / "examples", source, len(source))
    assert sorted(path.name for path in (tmp_path / "examples").iterdir()) == sorted(path.name for path in paths)
    assert len(paths) == len(source) - 2
    with Image.open(paths[0]) as image, Image.open(whole) as original:
        assert image.size == original.size


@pytest.mark.parametrize("count", [0, 2])
def test_examples_do_not_change_other_files_in_their_folder(tmp_path, count):
    (tmp_path / "mine").mkdir()
    for path in (tmp_path / "mine.png", tmp_path / "mine" / "text"):
        path.write_text("dear to me")
    source = ArraySource(np.zeros((2, 8, 8), np.uint8), np.array([0, 1]), ("a", "b"), ("cat", "dog"))
    (tmp_path / "cat-0.png").symlink_to(tmp_path / "mine.png")
    for _ in range(2):
        assert len(write_examples(tmp_path, source, count)) == count
    assert (tmp_path / "mine.png").read_text() == "dear to me"
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2 + max(count, 1)


@pytest.mark.parametrize(("shape", "mode"), [((9, 8), "L"), ((9, 8, 1), "L"), ((3, 4, 3), "RGB"), ((9, 8, 3), "RGB")])
def test_examples_of_arrays_are_their_pixels(tmp_path, shape, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (2, *shape), np.uint8)
    source = ArraySource(pixels, np.array([0, 1]), ("a", "b"), ("cat/dog", "\udce9"))
    paths = write_examples(tmp_path / "examples", source, 5)
    assert [path.name for path in paths] == ["cat_dog-0.png", "_-1.png"]
    for path, wanted in zip(paths, pixels):
        with Image.open(path) as image:
            assert image.mode == mode
            np.testing.assert_array_equal(np.asarray(image), wanted.reshape(image.size[1], image.size[0], -1).squeeze())


@pytest.mark.parametrize("letter", ["a", "é", "語"])  # one, two and three bytes
def test_examples_of_a_class_with_the_longest_name_of_a_folder_are_written(tmp_path, letter):
    (tmp_path / (name := letter * (255 // len(letter.encode())))).mkdir()
    source = ArraySource(np.zeros((1, 8, 8), np.uint8), np.array([0]), ("a",), (name,))
    (path,) = write_examples(tmp_path, source, 1)
    assert path.is_file()
    assert name.startswith(path.stem.removesuffix("-0"))


def test_a_loss_that_is_not_a_number_is_null_in_the_report():
    assert evaluation_report(dataclasses.replace(EVALUATION, loss=float("nan")), ("cat", "dog"))["loss"] is None


@pytest.mark.parametrize("name", ["$a_{b$", "$x$ and $y$", "caf\udce9", "^_\\", ""])
def test_a_class_may_have_any_name_in_the_confusion(tmp_path, name, caplog):
    draw(tmp_path / "confusion.png", paint_confusion, EVALUATION.confusion, EVALUATION, ("cat", name))
    with Image.open(tmp_path / "confusion.png") as image:
        image.load()
    assert not caplog.records


def test_a_picture_that_cannot_be_drawn_is_logged_and_the_run_continues(tmp_path, caplog):
    """Here because there is nothing to draw; in a run a font, the layout or the disk may be the cause."""
    draw(tmp_path / "confusion.png", paint_confusion, EVALUATION.confusion, EVALUATION, ())
    draw(tmp_path / "curves.png", paint_curves, [{}])
    expected = [record.getMessage() for record in caplog.records]
    assert len(expected) == 2
    for message, name in zip(expected, ("confusion.png", "curves.png")):
        assert f"The picture {tmp_path / name} could not be drawn and is left out" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("installed", [True, False])
def test_names_that_no_installed_font_has_become_numbers(tmp_path, caplog, monkeypatch, installed):
    from matplotlib import font_manager

    if not installed:
        fonts = font_manager.fontManager.ttflist
        own = [font for font in fonts if font.name.startswith(("DejaVu Sans", "Last Resort"))]
        monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    elif pictures._fonts_for("犬") is None:
        pytest.skip("needs a font for Chinese")
    figure = paint_confusion(EVALUATION.confusion, EVALUATION, ("cat", "犬"))
    figure.savefig(tmp_path / "confusion.png")  # a missing glyph is a warning, which fails the test
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == (["cat", "犬"] if installed else ["0", "1"])
    assert ("evaluation.json" in figure.axes[0].get_xlabel()) != installed


def test_the_curves_of_one_interval_show_its_point_and_different_ticks():
    line = {"epoch": 1.0, "loss": 1.0, "accuracy": 0.5, "learning_rate": 1e-3, "top1": 0.495}
    figure = paint_curves([{"kind": "train", **line}, {"kind": "evaluation", **line}])
    assert all(curve.get_marker() == "o" for axes in figure.axes for curve in axes.lines)
    figure.draw_without_rendering()
    ticks = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert len(set(ticks)) == len(ticks)


def test_the_summary_names_the_report_and_the_accuracy(tmp_path, capsys):
    config = tiny(tmp_path / "run")
    print_summary(config, 7, {"params": EVALUATION})
    said = capsys.readouterr().out
    assert f"Report    {config.run_dir / 'report.html'}" in said
    assert f"Held-out accuracy {EVALUATION.top1:.2%}" in said
    print_summary(config, 7, {})
    assert "Stopped after step 7" in capsys.readouterr().out

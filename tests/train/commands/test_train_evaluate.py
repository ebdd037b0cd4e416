"""`python -m train evaluate`: which images a model is scored on, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import programs
from evaluations import PROCESSOR, evaluate, write_classes, write_model
from pictures import IMAGES
from poolformer_jax import (
    PoolFormerConfig,
    PoolFormerForImageClassification,
    export_model,
    load_pretrained,
    save_pretrained,
)
from selection import slow_after
from train.commands.evaluate_config import EvaluateConfig
from train.config import PretrainedNetwork
from train.network import make_network
from training import tiny


@pytest.mark.parametrize(
    ("options", "images", "said"),
    slow_after(
        2,
        [
            ({}, 60, "all images of its class folders"),
            ({"split": "validation"}, 6, "split validation (10 % of every class, which training holds out)"),
            ({"split": "train"}, 54, "split train (without the 10 % of every class that training holds out)"),
            ({"held_out": 0.25}, 15, "split validation (25 % of every class, which training holds out)"),
        ],
    ),
)
def test_undivided_class_folders_are_scored_whole_unless_a_split_is_asked_for(
    model, tmp_path, capsys, options, images, said
):
    pool = write_classes(tmp_path / "pool", ("ant", "bee", "cat"))
    result = evaluate(model, f"folder:{pool}", output=tmp_path / "out", **options)
    assert result.examples == images
    assert f"{said}: {images} images" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["scored"] == said


def test_the_report_may_go_below_the_home(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    evaluate(model, f"folder:{write_classes(tmp_path / 'pool', ('ant', 'bee', 'cat'), images=2)}", output=Path("~/out"))
    assert {path.name for path in (tmp_path / "home" / "out").iterdir()} == {
        *("evaluation.json", "confusion.png", "mistakes.png", "predictions.csv", "report.html")
    }


@pytest.mark.parametrize("name", ["validation", "val"])
def test_divided_class_folders_are_scored_by_their_validation_split(model, tmp_path, capsys, name):
    write_classes(tmp_path / "train", ("ant", "bee", "cat"), images=3)
    write_classes(tmp_path / name, ("ant", "bee", "cat"), images=2)
    (tmp_path / name / "ant" / "@eaDir").mkdir()
    assert evaluate(model, f"folder:{tmp_path}").examples == 6
    printed = capsys.readouterr().out
    assert "split validation: 6 images" in printed
    assert "passed over 1 other file: 1 @eaDir/\n" in printed
    assert evaluate(model, f"folder:{tmp_path / name}").examples == 6  # that folder by itself is one pool


def test_undivided_label_files_are_scored_whole(model, tmp_path, capsys):
    write_classes(tmp_path, ("ant", "bee", "cat"), images=4)
    rows = [f"{name}/{number}.png,{name}" for name in ("ant", "bee", "cat") for number in range(4)]
    (tmp_path / "labels.csv").write_text("\n".join(["file_name,label", *rows]))
    assert evaluate(model, f"labels:{tmp_path}/labels.csv").examples == 12
    assert "all images: 12 images" in capsys.readouterr().out


def test_a_test_split_that_is_not_scored_is_named(model, tmp_path, capsys):
    for split in ("train", "test"):
        write_classes(tmp_path / split, ("ant", "bee", "cat"), images=4)
    assert evaluate(model, f"folder:{tmp_path}").examples == 3
    assert "the split test is not used: evaluate --split test scores it" in capsys.readouterr().out


@pytest.mark.parametrize(("uint8", "flip"), [(True, False), pytest.param(False, True, marks=pytest.mark.slow)])
def test_an_exported_file_gets_the_score_of_its_network(model, tmp_path, uint8, flip):
    pytest.importorskip("onnxruntime")
    network, variables = load_pretrained(model)
    export_model(tmp_path / "n.onnx", network.config, variables, PROCESSOR, uint8=uint8)
    root = write_classes(tmp_path / "images", ("ant", "bee", "cat"), images=5)
    expected = evaluate(model, f"folder:{root}", flip=flip)
    found = evaluate(str(tmp_path / "n.onnx"), f"folder:{root}", flip=flip)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    np.testing.assert_array_equal(found.confusion, expected.confusion)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"size": {"height": 32, "width": 32}},  # squashed
        {"size": {"height": 40, "width": 48}, "do_center_crop": False, "resample": 1},
        {"do_rescale": False, "image_mean": (124.0, 116.0, 104.0), "image_std": (58.0, 57.0, 57.0)},
        {"do_normalize": False, "crop_size": {"height": 40, "width": 56}},
    ],
    ids=["squash", "a rectangle, Lanczos", "pixels of 0..255", "a margin, not normalised"],
)
def test_evaluation_preprocesses_as_the_model_whatever_that_is(tmp_path, changes):
    processor = dataclasses.replace(PROCESSOR, **changes)
    config = PoolFormerConfig(depths=(1,) * 4, hidden_sizes=(8, 8, 8, 8), num_labels=2, id2label={0: "ant", 1: "bee"})
    model = PoolFormerForImageClassification(config)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    variables["params"]["head"]["kernel"] = jax.random.normal(jax.random.key(1), (8, 2))
    save_pretrained(tmp_path / "model", model, variables, image_processor=processor)
    for name in ("ant", "bee"):
        (tmp_path / "pool" / name).mkdir(parents=True)
        with Image.open(IMAGES / ("chelsea.jpg" if name == "ant" else "rocket.jpg")) as image:
            image.resize((90, 50)).save(tmp_path / "pool" / name / "0.png")
    paths = [tmp_path / "pool" / name / "0.png" for name in ("ant", "bee")]
    logits = jax.jit(model.apply)(variables, processor(paths)["pixel_values"]).logits
    wanted = -np.diag(jax.nn.log_softmax(logits)).mean()
    found = evaluate(str(tmp_path / "model"), f"folder:{tmp_path / 'pool'}")
    np.testing.assert_allclose(found.loss, wanted, rtol=1e-5)


def test_weights_that_are_no_numbers_get_no_score(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    arrays = load_file(folder / "flax_model.safetensors")
    save_file({name: array * np.float32("nan") for name, array in arrays.items()}, folder / "flax_model.safetensors")
    with pytest.raises(ValueError, match=r"no numbers\. Expected finite weights"):
        evaluate(str(folder), f"folder:{write_classes(tmp_path / 'images', ('ant', 'bee', 'cat'), 2)}")


def test_a_preprocessing_without_one_size_is_refused(tmp_path):
    model = write_model(tmp_path / "model", ("ant", "bee"))
    dataclasses.replace(PROCESSOR, do_center_crop=False).save_pretrained(model)
    with pytest.raises(ValueError, match="makes images of different sizes"):
        evaluate(model, "synthetic")


@pytest.mark.parametrize(("finished", "expected"), [(True, "/model."), (False, "/model, which exists when")])
def test_the_folder_of_a_run_is_refused_as_a_model(tmp_path, finished, expected):
    (tmp_path / "recipe.json").touch()
    if finished:
        (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=f"is the folder of a run. Expected .*{expected}"):
        evaluate(str(tmp_path), "synthetic")
    with pytest.raises(ValueError, match=f"is the folder of a run. Expected .*{expected}"):
        make_network(tiny(model=PretrainedNetwork(str(tmp_path))), ("ant", "bee"))


def start_evaluations(model, *own):
    """Begins one evaluation in as many processes as command lines are given."""
    common = ["evaluate", model, "--batch-size", "4", "--workers", "0"]
    return programs.stopping(programs.start_together([[*common, *words] for words in own], len(own)))


@pytest.mark.slow
def test_unreadable_images_of_all_processes_are_counted(model, tmp_path):
    pool = write_classes(tmp_path / "pool", ("ant", "bee", "cat"), images=4)
    for image in (pool / "cat").iterdir():  # one batch, of which every process has two
        image.write_bytes(b"not an image")
    words = ["--data", f"folder:{pool}", "--on-bad-image", "skip", "--output", str(tmp_path / "out")]
    with start_evaluations(model, words, words) as started:
        printed = [programs.finish(process) for process in started]
    assert "8 images" in printed[0]
    assert "4 images could not be read and are not in the score." in printed[0]
    assert "not in the score" not in printed[1]
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (report["examples"], report["left_out"]) == (8, 4)


@pytest.mark.slow
def test_processes_with_other_data_than_process_0_all_end(model, tmp_path):
    pool = write_classes(tmp_path / "pool", ("ant", "bee", "cat"), images=4)
    other = write_classes(tmp_path / "other", ("ant", "bee", "zebra"), images=3)
    commands = ["--data", f"folder:{pool}"], ["--data", f"folder:{other}", "--batch-size", "8"]
    with start_evaluations(model, *commands) as (first, unlike):
        expected = programs.finish(unlike, code=1)
        for difference in ("classes: gone: cat; new: zebra", "images: 12 -> 9", "data.batch_size: 4 -> 8"):
            assert difference in expected
        assert "Traceback" not in expected
        assert "Other processes differ from process 0: [1]" in programs.finish(first, code=1)


def test_a_multi_label_network_needs_data_with_several_labels(tmp_path):
    saved = write_model(tmp_path / "model", ("ant", "bee", "cat"))
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"problem_type": "multi_label_classification"}))
    with pytest.raises(ValueError, match=r"source='digits': expected labels:FILE or parquet:PATH with problem_type"):
        evaluate(saved, "digits")
    with pytest.raises(ValueError, match=r"results_file, classes: .* does not choose one class for an image"):
        evaluate(saved, "digits", results_file=tmp_path / "results.csv", classes="data")


def test_options_that_would_have_no_effect_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"variant='s12': expected the default for exported files.\n.*dtype='bfloat16'"
    ):
        EvaluateConfig("network.onnx", "digits", variant="s12", dtype="bfloat16")
    EvaluateConfig("network.onnx", "digits", cache_dir=tmp_path, token="t", local_files_only=True)
    with pytest.raises(ValueError, match=r"real_labels=.*: expected None with imagenet-c"):
        EvaluateConfig("sail/poolformer_s12", "imagenet-c:c", real_labels=tmp_path / "real.json")
    with pytest.raises(ValueError, match=r"data_dir=.*: expected None: only tfds.*\n.*label_column='breed'"):
        EvaluateConfig("sail/poolformer_s12", "folder:dogs", data_dir=tmp_path, label_column="breed")


@pytest.mark.parametrize("classes", [5, 6])
def test_top_5_is_printed_for_more_than_five_classes(tmp_path, capsys, classes):
    names = tuple("abcdef"[:classes])
    path = write_model(tmp_path / "model", names)
    evaluate(path, f"folder:{write_classes(tmp_path / 'data', names, images=1)}")
    assert ("top-5" in capsys.readouterr().out) == (classes == 6)


def test_the_network_and_names_to_leave_out_can_be_given(model, tmp_path):
    data = f"folder:{write_classes(tmp_path / 'data', ('ant', 'bee', 'cat'), images=1)}"
    shutil.copytree(model, tmp_path / "more")
    weights = tmp_path / "more" / "flax_model.safetensors"
    arrays = load_file(weights)
    save_file({**arrays, "metric.total": arrays["head/bias"]}, weights)
    with pytest.raises(ValueError, match=r"unexpected: metric\.total"):
        evaluate(str(tmp_path / "more"), data)
    assert evaluate(str(tmp_path / "more"), data, ignore=("metric.*",)).examples == 3
    with pytest.raises(ValueError, match="the variant 'poolformer_ln_s12'"):
        evaluate(model, data, variant="poolformer_ln_s12")


def test_fine_tuning_starts_from_the_given_network_without_the_names_to_leave_out(model, tmp_path):
    config = tiny(tmp_path)
    for options, message in (
        ({"variant": "poolformer_ln_s12"}, "the variant 'poolformer_ln_s12'"),
        ({"ignore": ("norm/*",)}, "missing: norm/"),
    ):
        pretrained = dataclasses.replace(config, model=PretrainedNetwork(source=model, **options))
        with pytest.raises(ValueError, match=message):
            make_network(pretrained, ("ant", "bee"))


def test_a_model_on_the_hub_is_looked_for_as_the_flags_say(tmp_path):
    pytest.importorskip("huggingface_hub")
    with pytest.raises(FileNotFoundError, match="not in the Hub's cache"):
        evaluate("someone/tiny", "digits", cache_dir=tmp_path, local_files_only=True)

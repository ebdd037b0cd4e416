"""The commands of `python -m poolformer_jax`: their output and exit codes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from convert.command_line import main as convert
from paths import ROOT
from poolformer_jax.cli import COMMANDS, main
from poolformer_jax.cli.arguments import waiting
from poolformer_jax.images import imagenet_labels
from poolformer_jax.inference.classifier import ImageClassifier
from poolformer_jax.inference.grad_cam import label_index
from poolformer_jax.network import VARIANTS
from poolformer_jax.weights import save_pretrained
from selection import slow_after
from small_networks import CONFIG, IMAGES, MODEL, PROCESSOR, VARIABLES

LN_S12 = "the variant 'poolformer_ln_s12'"
CAT, COFFEE = str(IMAGES / "chelsea.jpg"), str(IMAGES / "coffee.jpg")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "model"
    save_pretrained(folder, MODEL, VARIABLES, image_processor=PROCESSOR)
    return str(folder)


@pytest.fixture(scope="module")
def expected():
    classifier = ImageClassifier(CONFIG, VARIABLES, PROCESSOR)
    return lambda path: [prediction.label for prediction in classifier(path, top_k=7)]


def test_predict_prints_the_most_probable_labels_of_each_image(folder, expected, capsys):
    assert main(["predict", CAT, COFFEE, "--weights", folder, "--top-k", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[3]] == [CAT, COFFEE]
    assert [line.split("%  ")[1] for line in lines[1:3] + lines[4:6]] == expected(CAT)[:2] + expected(COFFEE)[:2]
    assert max(map(len, lines)) <= 80 + len(CAT)


def test_predict_prints_json_lines_and_continues_after_a_bad_image(folder, expected, capsys, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "manual.pdf").write_text("Pillow writes PDF and does not read it")
    shutil.copy(CAT, tmp_path / "a.jpg")
    code = main(["predict", str(tmp_path), COFFEE, "--weights", folder, "--json", "--top-k", "1"])
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert [Path(row["image"]).name for row in rows] == ["a.jpg", "broken.png", "coffee.jpg"]
    assert rows[0]["predictions"][0]["label"] == expected(CAT)[0]
    assert 0 < rows[2]["predictions"][0]["probability"] <= 1
    assert "not an image" in rows[1]["error"]
    assert code == 1
    assert "broken.png" in captured.err


def test_list_shows_every_variant_with_the_published_numbers(capsys):
    assert main(["list"]) == 0
    output = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in output.splitlines() if line}
    # Parameters of the published state dicts; top-1 from the READMEs of sail-sg/poolformer and sail-sg/metaformer.
    assert rows["s12"][1:] == ["11,915,176", "1.82", "G", "77.2", "-", "-", "-", "2-2-6-2"]
    assert rows["m48"][1:] == ["73,473,448", "11.59", "G", "82.5", "-", "-", "-", "8-8-24-8"]
    assert rows["caformer_s18"][1:] == ["26,341,656", "4.11", "G", "83.6", "85.0", "84.1", "85.4", "3-3-9-3"]
    assert set(VARIANTS) <= rows.keys()
    assert "sail-sg/poolformer" in output and "sail-sg/metaformer" in output
    assert max(map(len, output.splitlines())) <= 80


def test_summary_shows_layers_of_a_variant_or_a_trained_folder(folder, capsys):
    assert main(["summary", "s12"]) == 0
    output = capsys.readouterr().out
    assert "11,915,176" in output
    assert "stages_2/blocks_0..5 (pooling)" in output
    assert max(map(len, output.splitlines())) <= 80
    for source in (folder, f"{folder}/flax_model.safetensors", f"{folder}/config.json"):
        assert main(["summary", source, "--image-size", "64", "--local-files-only"]) == 0
        assert "16 x 16 x 8" in capsys.readouterr().out


def test_summary_reads_weights_in_shards(folder, capsys, tmp_path):
    shutil.copy(f"{folder}/flax_model.safetensors", tmp_path / "one.safetensors")
    shutil.copy(f"{folder}/config.json", tmp_path)
    names = list(load_file(tmp_path / "one.safetensors"))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "one.safetensors")}))
    assert main(["summary", str(index), "--image-size", "64"]) == 0
    assert "16 x 16 x 8" in capsys.readouterr().out


def test_cam_writes_the_overlay_of_the_requested_class(folder, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["cam", CAT, "--weights", folder]) == 0
    assert capsys.readouterr().out.startswith(f"chelsea_cam.png: {expected(CAT)[0]}, ")
    other = expected(CAT)[3]
    assert main(["cam", CAT, "--weights", folder, "--label", other, "--output", "other.png"]) == 0
    pictures = [np.asarray(Image.open(name)) for name in ("chelsea_cam.png", "other.png")]
    assert pictures[0].shape == (192, 192, 3)  # 64 x 64, enlarged
    assert not np.array_equal(*pictures)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chelsea_cam.png", "other.png"]


def test_a_name_of_two_classes_is_refused():
    with pytest.raises(ValueError, match="classes 134 and 517 are both called 'crane'"):
        label_index("crane", imagenet_labels())
    assert label_index("tabby cat", imagenet_labels()) == 281
    assert label_index("134", imagenet_labels()) == 134


def test_the_waiting_message_stays_on_one_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    with waiting(f"Loading {'very/' * 20}long/path"):
        shown = capsys.readouterr().err
    assert shown.startswith("Loading very/") and shown.endswith("… ...")
    assert len(shown) < 40
    assert capsys.readouterr().err == "\r\x1b[K"


def test_export_writes_a_file_and_prints_its_difference(folder, capsys, tmp_path):
    assert main(["export", folder, str(tmp_path / "network.stablehlo"), "--image-size", "96"]) == 0
    assert "Logits differ from the network's by at most" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"network.stablehlo", "network.stablehlo.json"}
    network = jax.export.deserialize(bytearray((tmp_path / "network.stablehlo").read_bytes()))
    assert network.in_avals[0].shape[1:] == (96, 96, 3)


def test_an_export_with_wrong_logits_exits_with_1(folder, capsys, tmp_path, monkeypatch):
    wrong = lambda config, folded, pixels, **options: pixels.sum((1, 2)) @ jnp.ones((3, 7))  # noqa: E731
    monkeypatch.setattr("poolformer_jax.export.stablehlo_file.folded_apply", wrong)
    assert main(["export", folder, str(tmp_path / "network.stablehlo")]) == 1
    assert capsys.readouterr().err.startswith("error: The converted network computes other logits")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", CAT, "--weights", "nowhere/at/all"], "nowhere/at/all"),
        (["predict", "{empty}", "--weights", "{folder}"], "has no image file. Expected at least one.\n"),
        (
            ["predict", ".", "--weights", "{folder}"],
            "The folder . has no image file. Expected at least one. Its subfolders",
        ),
        (["predict", "https://a.org/cat.jpg", "--weights", "{folder}"], "URLs are not downloaded"),
        (["cam", "missing.jpg", "--weights", "{folder}"], "no image file 'missing.jpg'"),
        (["cam", CAT, "--weights", "{folder}", "--label", "unicorn"], "no class 'unicorn'"),
        (["cam", CAT, "--weights", "{folder}", "--output", "why.psd"], "expected a picture's ending, one of .png"),
        (
            ["cam", CAT, "--weights", "{folder}", "--output", "/proc/why.png"],
            "Cannot write /proc/why.png: No such",
        ),
        (["export", "{folder}", "there/network.onnx"], "There is no folder there"),
        (["summary", "{folder}/preprocessor_config.json"], "Expected model_type 'poolformer'"),
        (["summary", "no/such/network"], "There is no model at no/such/network"),
        (["export", "{folder}", "network.pb"], ".stablehlo or .onnx"),
        (["summary", "s13"], "no variant 's13'"),
        (["summary", "s12", "--variant", "s24"], "s12 is summarised without reading weights. Expected no variant"),
        (["summary", "{folder}/config.json", "--ema", "--ignore", "x"], "Expected no ignore, use_ema"),
        (["summary", "{folder}", "--revision", "v2"], "on this machine and has no revisions"),
        (["predict", CAT, "--weights", "{folder}", "--variant", "poolformer_ln_s12"], LN_S12),
        (["embed", CAT, "--weights", "{folder}", "--output", "f.npy", "--variant", "poolformer_ln_s12"], LN_S12),
        (["cam", CAT, "--weights", "{folder}", "--variant", "poolformer_ln_s12"], LN_S12),
        (["export", "{folder}", "network.onnx", "--variant", "poolformer_ln_s12"], LN_S12),
        (["demo", "--weights", "{folder}", "--variant", "poolformer_ln_s12"], LN_S12),
        (["predict", CAT, "--weights", "{folder}", "--ignore", "head/bias"], "missing: head/bias"),
        (["export", "{folder}", "network.onnx", "--ignore", "head/bias"], "missing: head/bias"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_failure_prints_one_message_and_exits_with_1(arguments, message, folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main([argument.format(folder=folder, empty=empty) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert list(tmp_path.iterdir()) == [empty]


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["predict"], ["predict", CAT, "--top-k", "0"], ["export", "x"], ["demo", "--port", "99999"]],
    ids=str,
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert "usage: python -m poolformer_jax" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.NAME)
def test_every_command_has_help_with_an_example_in_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit:
        main([command.NAME, "--help"])
    output = capsys.readouterr().out
    assert exit.value.code == 0
    assert f"python -m poolformer_jax {command.NAME}" in output.split("example:")[1]
    assert max(map(len, output.splitlines())) <= 80


@pytest.mark.parametrize("columns", [40, 60, 100])
@pytest.mark.parametrize("program", [["poolformer_jax", "export"], ["convert"], ["convert", "inspect"]], ids=" ".join)
def test_help_is_wrapped_to_the_terminals_width(program, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    name, *command = program
    with pytest.raises(SystemExit):
        {"poolformer_jax": main, "convert": convert}[name]([*command, "--help"])
    output = capsys.readouterr().out
    paragraphs = [line for line in output.splitlines() if line and line[0] != " "]
    assert max(map(len, paragraphs)) <= columns
    assert " ".join(output.split("\n\n")[1].split()).endswith(".")


@pytest.mark.parametrize(
    ("arguments", "imported"), [(["convert", "a", "b"], "rich"), (["poolformer_jax", "list"], "jax")], ids=str
)
def test_ctrl_c_during_imports_exits_quietly_with_130(arguments, imported, tmp_path):
    # A module that sends the signal while it is imported, and turns KeyboardInterrupt into another exception.
    (tmp_path / f"{imported}.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "except KeyboardInterrupt as error:\n    raise ImportError('initialization failed') from error\n"
    )
    command = [sys.executable, "-m", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


# rich, optax and orbax come with flax.
EXTRAS = ("huggingface_hub", "gradio", "onnx", "onnxruntime", "tyro", "grain", "sklearn", "matplotlib")
CORE_ONLY = f"""
import sys


class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, NotInstalled())
from poolformer_jax.cli import main

for arguments in (["predict", {CAT!r}, "--weights", sys.argv[1]], ["list"], ["summary", "s12"]):
    if main(arguments) != 0:
        sys.exit(f"{{arguments}} failed")
for arguments, extra in (
    (["demo", "--weights", sys.argv[1]], "demo"),
    (["export", sys.argv[1], "n.onnx"], "export"),
    (["predict", {CAT!r}], "hub"),
):
    print(f"{{extra}}: {{main(arguments)}}", file=sys.stderr)
"""


def test_predict_list_and_summary_need_no_extra_and_the_others_name_theirs(folder):
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-c", CORE_ONLY, folder]
    root = ROOT
    done = subprocess.run(command, env=environment, text=True, capture_output=True, cwd=root)
    assert done.returncode == 0, done.stderr
    for extra in ("demo", "export", "hub"):
        assert f"{extra}: 1" in done.stderr
        assert f"pip install -e '.[{extra}]'" in done.stderr


def test_a_closed_pipe_is_not_an_error():
    command = f"{sys.executable} -m poolformer_jax list | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], text=True, capture_output=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["top-1", "after", "21k"]


@pytest.mark.parametrize(
    ("command", "closed"),
    slow_after(
        1,
        [
            ("poolformer_jax summary s12", "1>&- 2>&-"),
            *[("poolformer_jax summary s12", "1>&-"), ("convert --help", "1>&- 2>&-"), ("train --help", "2>&-")],
        ],
    ),
)
def test_programs_run_with_closed_output_streams(command, closed):
    command = f"{sys.executable} -m {command} {closed}"
    done = subprocess.run(["bash", "-c", command], text=True, capture_output=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert bool(done.stdout) == ("1>" not in closed)


def test_the_module_runs_as_a_program(folder):
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "poolformer_jax", "predict", CAT, "missing.jpg", "--weights", folder]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, cwd=ROOT)
    assert done.returncode == 1
    assert CAT in done.stdout
    assert "missing.jpg" in done.stderr
    assert "\r" not in done.stderr  # waiting messages are for terminals only


def test_a_file_whose_name_is_not_utf_8_is_classified_like_others(folder, tmp_path, capsys):
    shutil.copy(CAT, os.fsencode(tmp_path) + b"/b\xff.jpg")
    shutil.copy(CAT, tmp_path / "c.jpg")
    assert main(["predict", str(tmp_path), "--weights", folder, "--top-k", "1"]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert shown == [f"{tmp_path}/b\\xff.jpg", f"{tmp_path}/c.jpg"]

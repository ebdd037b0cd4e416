"""The command line: help, usage errors, error messages, exit codes, and the files of a run."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jax.errors import JaxRuntimeError
from PIL import Image

import programs
from poolformer_jax.files import write_json
from poolformer_jax.version import __version__
from train import command_line, compute, loop
from train.command_line import main
from train.recipes import RECIPES
from train.report.journal import MetricsFile
from train.report.progress import create_console
from training import tiny


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def test_a_file_that_cannot_be_written_is_named_without_a_traceback(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(command_line, "_overview", lambda: write_json(tmp_path / "file" / "evaluation.json", {}))
    assert main(["--help"]) == 1
    assert capsys.readouterr().err.startswith(f"\nerror: Cannot write {tmp_path}/file/evaluation.json: ")


def test_the_overview_names_every_recipe_and_command_in_80_columns(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    grouped = re.findall(r"([a-z0-9_-]+)\{(.*?)\}", text)
    named = [f"{prefix}{rest}" for prefix, group in grouped for rest in group.split(",")]
    assert [name for name in RECIPES if name not in named and f"\n  {name} " not in text] == []
    assert all(f"\n  {name} " in text for name in ("evaluate", "prepare", "doctor"))
    assert max(map(len, text.splitlines())) <= 80


# One of each kind.
KINDS = ("digits", "imagenet-s12", "imagenet-caformer_b36", "imagenet-caformer_s18_384", "finetune", "smoke")


@pytest.mark.parametrize("name", KINDS)
def test_every_field_of_a_recipe_is_a_flag_with_help_and_default(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert f"python -m train {name}" in text
    flags = set(re.findall(r"--[a-z0-9-]+(?:\.[a-z0-9-]+)*", text))
    assert {"--run-dir", "--data.source", "--data.mix.cutmix", "--optimizer.learning-rate", "--mesh.fsdp"} <= flags
    # A flag is followed by its type, its help and its default; without help, by type and default.
    words = " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())
    without_help = re.findall(r"(--[a-z0-9.-]+) [^-.]{1,20} \(default", words)
    assert without_help == []


@pytest.mark.parametrize("name", KINDS)
def test_the_text_of_a_recipe_is_as_wide_as_the_screen_but_for_its_command(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit):
        main([name, "--help"])
    _, text = re.split(r"\n.* options ", capsys.readouterr().out)[0].split("\n\n", 1)
    assert max(len(line) for line in text.splitlines() if not line.startswith("Command:  python -m train")) <= 60
    assert " ".join(text.split()) == " ".join(RECIPES[name].details.split())


@pytest.mark.parametrize("arguments", [pytest.param(["digits", "--help"], marks=pytest.mark.slow), ["--help"]])
def test_a_closed_output_is_not_an_error(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    program = [sys.executable, "-m", "train", *arguments]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ended = subprocess.run(program, cwd=programs.ROOT, env=buffered, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_failed_run_ends_although_a_thread_waits_and_frees_what_it_holds():
    program = (
        "import atexit, threading; from train.__main__ import _exit; threading.Thread(target=threading.Event().wait)"
        ".start(); atexit.register(print, 'freed'); _exit(1, failed=True)"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=programs.ROOT, capture_output=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, b"freed\n", b"")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["bogus"], "There is no recipe or command 'bogus'.\nAll of them: python -m train --help"),
        (["finetun"], "Did you mean finetune?"),
        (["finetune", "--recipe", "recipe.json"], "--recipe FILE comes first"),
        (["doctor"], "expected a recipe, one of: digits"),
        (["doctor", "bogus"], "expected a recipe, one of: digits"),
    ],
)
def test_an_unknown_name_is_a_usage_error_that_lists_the_known_ones(arguments, expected, capsys):
    assert main(arguments) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["digits", "--bogus", "1"], ["digits", "--seed", "x"], ["evaluate"], ["--optimizer.epochs", "0"]]
)
def test_a_wrong_flag_or_value_is_a_usage_error(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["smoke", "--run-dir", "gs://bucket/run"], "--checkpoint-dir gs://... beside a local --run-dir"),
        (["smoke", "--checkpoint-dir", "gs:/bucket/run"], "or gs://... or s3://..."),
        (["smoke", "--data.source", "tfds:gs://bucket/data"], "mount a bucket on every host"),
        (["smoke", "--data.source", "tfds:flowers", "--data.data-dir", "gs://bucket"], "mount a bucket on every host"),
        (["evaluate", "model", "--data", "digits", "--output", "gs://bucket/result"], "a bucket that is mounted"),
        (["prepare", "folder:flowers", "gs://bucket/packed"], "one of a mounted bucket"),
    ],
)
def test_a_bucket_is_refused_where_a_local_folder_is_needed(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert expected in " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
    assert not list(tmp_path.iterdir())


def test_a_windows_drive_and_a_bucket_for_checkpoints_are_accepted():
    assert tiny(Path("C:/runs/flowers")).run_dir == Path("C:/runs/flowers")
    assert tiny(checkpoint_dir="gs://bucket/run").checkpoints == "gs://bucket/run"


def test_an_error_is_one_message_without_a_traceback(tmp_path, capsys):
    assert main(["smoke", "--run-dir", str(tmp_path), "--data.batch-size", "33", "--distributed.mode", "off"]) == 1
    message = capsys.readouterr().err
    assert "error: data.batch_size=33 cannot be shared evenly by 8 devices. Expected a multiple of 8" in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("module", "arguments", "expected"),
    [
        ("sklearn.datasets", ["digits"], "pip install -e '.[train]'"),
        ("tensorflow_datasets", ["smoke", "--data.source", "tfds:flowers"], "pip install -e '.[train]'"),
        pytest.param(
            *("huggingface_hub", ["finetune", "--data.source", "synthetic"], "pip install -e '.[hub]'"),
            marks=pytest.mark.slow,  # takes five seconds
        ),
        ("gcsfs", ["smoke", "--checkpoint-dir", "gs://bucket/run"], "'.[train,gcs]'"),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_the_way_to_install_it(
    tmp_path, monkeypatch, capsys, module, arguments, expected
):
    monkeypatch.setitem(sys.modules, module, None)
    usual = ["--run-dir", str(tmp_path), "--data.batch-size", "8", "--distributed.mode", "off"]
    assert main([*arguments, *usual]) == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert module.partition(".")[0] in message
    assert expected in message


@pytest.mark.slow
def test_a_missing_package_that_every_run_needs_is_named():
    program = "import sys; sys.modules['orbax.checkpoint'] = None; from train.command_line import main; "
    command = [sys.executable, "-c", f"{program} sys.exit(main(['smoke']))"]
    ended = subprocess.run(command, cwd=programs.ROOT, capture_output=True, text=True)
    assert (ended.returncode, "Traceback" in ended.stderr) == (1, False)
    assert "pip install -e '.[train]'" in ended.stderr


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 2 TiB"),
        MemoryError(),
        JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating"),
    ],
)
def test_out_of_memory_errors_say_what_needs_less(tmp_path, monkeypatch, capsys, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(loop, "make_parts", fail)
    assert main(["smoke", "--run-dir", str(tmp_path), "--distributed.mode", "off"]) == 1
    message = capsys.readouterr().err
    assert str(error) in message
    assert " \n" not in message
    assert "--optimizer.accumulate 2" in message


@pytest.mark.skipif(sys.platform != "linux", reason="finds workers through /proc")
@pytest.mark.slow
def test_a_killed_data_worker_ends_the_run_with_one_message(tmp_path, monkeypatch, capsys):
    """As by a full /dev/shm, to which a worker writes."""

    def to_devices(*given):
        for worker in programs.workers_of(os.getpid()):
            os.kill(worker, signal.SIGBUS)
        return inner(*given)

    inner = loop.to_devices
    monkeypatch.setattr(loop, "to_devices", to_devices)
    arguments = [*programs.TINY, "--run-dir", str(tmp_path), "--data.workers", "1", "--distributed.mode", "off"]
    assert main(arguments) == 1
    output = capsys.readouterr().err
    assert "Traceback" not in output
    assert output.count("error: ") == 1
    assert re.search(r"\nerror: A data worker failed: .* exit code -7", output)
    assert "--shm-size" in output


def _fails_in_another_package(*arguments):
    return np.broadcast_to(np.zeros(3), 4)


@pytest.mark.parametrize(
    "fail", [_fails_in_another_package, [].remove], ids=["in another package", "in C that our code calls"]
)
def test_errors_that_are_bugs_keep_their_traceback(tmp_path, monkeypatch, fail):
    monkeypatch.setattr(loop, "initialize", fail)
    with pytest.raises(ValueError, match=r"broadcast|not in list"):
        main(["smoke", "--run-dir", str(tmp_path)])


def test_a_file_in_place_of_a_folder_is_named_without_a_traceback(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([*programs.TINY, "--run-dir", str(tmp_path / "file" / "run"), "--distributed.mode", "off"]) == 1
    expected = f"The folder {tmp_path / 'file' / 'run'} cannot be made: Not a directory. Expected another"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("codes", "finishes"),
    [([0, 1, 134, 0], True), ([1, 2], False), ([0, 3], False)],  # 0 first: SIGTERM
    ids=["to the end", "to a wrong command line", "to a divergence"],
)
def test_the_script_of_the_guide_restarts_a_run_unless_it_would_fail_again(tmp_path, codes, finishes):
    guide = (programs.ROOT / "docs" / "tpu-pod.md").read_text()
    (script,) = re.findall(r"^export JAX_COMPILATION_CACHE_DIR.*?^done$", guide, re.MULTILINE | re.DOTALL)
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    program = f"""
sleep() {{ :; }}
python() {{
  if [ ! -s codes ]; then echo "once too often" > codes; return 2; fi
  read -r code < codes && sed -i 1d codes
  if [ ! -s codes ] && {"true" if finishes else "false"}; then touch finished.json; fi
  return "$code"
}}
{script.replace("/disk/runs/s12/", "")}
"""
    subprocess.run(["bash", "-uc", program], cwd=tmp_path, check=False, timeout=30)
    assert (tmp_path / "codes").read_text() == ""


def test_a_failed_computation_of_several_processes_is_reported_as_the_loss_of_one(tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise JaxRuntimeError("Gloo all-reduce failed: Connection closed by peer")

    monkeypatch.setattr(loop, "initialize", fail)
    monkeypatch.setattr(compute, "has_other_processes", lambda: True)
    assert main(["smoke", "--run-dir", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert "Another process of the run has ended" in message
    assert "Connection closed by peer" in message


def test_a_run_leaves_everything_that_people_and_programs_need(uninterrupted):
    left = {path.relative_to(uninterrupted).parts[0] for path in uninterrupted.rglob("*")}
    assert left == {
        *(".lock", "recipe.json", "metrics.jsonl", "curves.png", "confusion.png", "finished.json"),
        *("checkpoints", "examples", "model", "model-ema", "tensorboard"),
        *("report.html", "predictions.csv", "mistakes.png"),
    }
    assert not list(uninterrupted.rglob("*partial*"))
    for name in ("curves.png", "confusion.png", "mistakes.png"):
        with Image.open(uninterrupted / name) as picture:
            picture.verify()
    recipe = json.loads((uninterrupted / "recipe.json").read_text())
    assert (recipe["data"]["batch_size"], recipe["model"]["depths"]) == (16, [1])
    report = json.loads((uninterrupted / "model" / "evaluation.json").read_text())
    assert report["examples"] == 64
    assert len(report["classes"]) == 10


def test_tensorboard_events_hold_what_metrics_jsonl_holds(uninterrupted):
    from tensorboardX.proto.event_pb2 import Event

    (path,) = (uninterrupted / "tensorboard").iterdir()
    content, events = path.read_bytes(), []
    while content:  # records: length (8 bytes), its checksum (4), the event, its checksum (4)
        size = int.from_bytes(content[:8], "little")
        events.append(Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    found = {
        event.step: value.simple_value for event in events for value in event.summary.value if value.tag == "train/loss"
    }
    lines = map(json.loads, (uninterrupted / "metrics.jsonl").read_text().splitlines())
    wanted = {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose([found[step] for step in wanted], list(wanted.values()), rtol=1e-6)


def test_lines_of_later_steps_are_dropped_when_a_run_resumes(tmp_path):
    lines = [{"kind": "train", "step": step, "loss": 1.0} for step in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"kind": "tra')
    with MetricsFile(tmp_path, start_step=2):
        pass
    kept = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in kept.splitlines()] == [1, 2]


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"poolformer-jax {__version__}\n"


def test_the_help_of_doctor_is_wrapped(capsys):
    assert main(["doctor", "--help"]) == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines() if "Example:" not in line) <= 80


def test_the_help_of_evaluate_names_its_source(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert "[OPTIONS] SOURCE" in capsys.readouterr().out


def test_forced_colors_do_not_make_a_file_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not create_console().is_terminal


@pytest.mark.slow
def test_a_run_starts_with_its_devices_images_network_and_folder(tmp_path):
    output = programs.run([*programs.TINY, "--run-dir", str(tmp_path), "--max-steps", "1"])
    header = output.split("step 1")[0].splitlines()
    assert [line.split()[0] for line in header] == ["Devices", "Images", "Network", "Run"]
    assert "64 to train on" in header[1]
    assert re.fullmatch(r"Network   [\d,]+ parameters, images of 16 x 16 pixels", header[2])
    assert header[3] == f"Run       {tmp_path}, 5 epochs, 1 step of 16 images"


@pytest.mark.parametrize(("name", "finished"), [("smoke", True), ("smoke", False), ("digits", True)])
def test_only_a_finished_smoke_run_says_that_it_passed(name, finished, tmp_path, monkeypatch, capsys):
    outcome = loop.Outcome(step=1, evaluations={"params": None} if finished else {}, stopped_by=None)
    monkeypatch.setattr(loop, "run", lambda config, console: outcome)
    monkeypatch.setattr("train.report.print_summary", lambda *_: None)
    assert main([name, "--run-dir", str(tmp_path)]) == 0
    assert ("Passed: images, training" in capsys.readouterr().out) == (name == "smoke" and finished)

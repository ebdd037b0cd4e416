"""Several processes train as one run, and end together: real processes on this machine."""

import json
import shutil
import signal
import socket
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import programs
from jpegs import needs_simd
from train.command_line import main
from train.resume import checkpoints
from training import class_folders, lines, steps_in, train_losses, unbalanced_tables


def assert_close(found: dict[int, float], wanted: dict[int, float]) -> None:
    """The same images and the same random numbers; only sums are rounded in another order."""
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-5)


@pytest.mark.slow
def test_several_processes_train_as_one_and_the_run_resumes_in_a_single_one(tmp_path, uninterrupted, shared_programs):
    run_dir = tmp_path / "run"
    arguments = [*programs.TINY, "--run-dir", str(run_dir)]
    part = ["--max-steps", "8", "--mesh.fsdp", "2", "--mesh.fsdp-min-size", "0"]
    first = programs.start_under_slurm([*arguments, *part], processes=2, devices=2)
    with programs.stopping(first):
        outputs = [programs.finish(process) for process in first]
    assert "step 8/8" in outputs[0]
    assert "loss" not in outputs[1], "only process 0 reports"
    assert main([*arguments, "--distributed.mode", "off"]) == 0
    assert_close(train_losses(run_dir), train_losses(uninterrupted))


@pytest.mark.slow
def test_several_processes_balance_classes_keep_the_best_weights_and_end_early_as_one(tmp_path):
    unbalanced_tables(tmp_path)
    best = ["--keep-best", "top1", "--patience", "2", "--evaluate-every", "1", "--optimizer.ema-decay", "None"]
    source = ["--data.source", f"parquet:{tmp_path / 'train.parquet'}", "--data.sampling", "balanced"]
    arguments = [*programs.TINY, *source, "--data.held-out", "0.4", *best, "--optimizer.epochs", "30"]
    arguments += ["--checkpoint-dir"]
    commands = [[*arguments, str(tmp_path / "shared"), "--run-dir", str(tmp_path / f"host {host}")] for host in (0, 1)]
    with programs.stopping(programs.start_together(commands, 2)) as started:
        outputs = [programs.finish(process) for process in started]
    programs.run([*arguments, str(tmp_path / "alone"), "--run-dir", str(tmp_path / "one")], devices=2)
    runs = [tmp_path / "host 0", tmp_path / "one"]
    assert_close(*map(train_losses, runs))
    ends = [json.loads((run / "finished.json").read_text()) for run in runs]
    assert ends[0] == ends[1]
    assert ends[0]["step"] < 60
    assert "Ended early: no better top1 in 2 evaluations." in outputs[0]
    predictions = [(run / "predictions.csv").read_text().splitlines() for run in runs]
    places = [[line.split(",")[:3] for line in found[1:]] for found in predictions]  # index, image, class
    assert places[0] == places[1]
    assert [int(place[0]) for place in places[0]] == list(range(21))
    assert not (tmp_path / "host 1" / "predictions.csv").exists()
    reports = [json.loads((run / "model" / "evaluation.json").read_text()) for run in runs]
    for name in ("step", "top1", "balanced_accuracy"):
        assert reports[0][name] == reports[1][name]


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_is_lost_ends_the_others_with_one_sentence(tmp_path, lost):
    endless = [*programs.TINY, "--run-dir", str(tmp_path / "run"), "--optimizer.epochs", "90000"]
    with programs.stopping(programs.start_together(endless, 2)) as started:
        programs.wait_until(lambda: lines(tmp_path / "run") >= 3, started[0])
        started[lost].kill()
        programs.finish(started[lost], code=-signal.SIGKILL)
        output = programs.finish(started[1 - lost], code=1)
    # Lines of jax's own threads may come after it.
    assert output.count("error: Another process of the run has ended or cannot be reached") == 1


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_with_one_image_each_stops_both_at_one_step(tmp_path):
    run_dir = tmp_path / "run"
    one_image_each = ["--data.batch-size", "2", "--data.mix.mixup", "0.8"]
    # The checkpoints are all that hosts have to share.
    shared = ["--checkpoint-dir", str(tmp_path / "shared"), "--save-every", "1000", "--optimizer.epochs", "400"]
    arguments = [*programs.TINY, "--run-dir", str(run_dir), *shared, *one_image_each]
    with programs.stopping(programs.start_together(arguments, 2)) as started:
        programs.wait_until(lambda: lines(run_dir) >= 3, started[0])
        for _ in range(2):  # the second changes nothing
            started[1].send_signal(signal.SIGTERM)
            time.sleep(0.02)  # two that wait to be delivered count as one
        outputs = [programs.finish(process, code=0) for process in started]
    (step,) = steps_in(tmp_path / "shared")
    assert f"Stopped after step {step}" in outputs[0]


def lose_arrays(state: Path) -> None:
    shutil.rmtree(state / "params")


def make_record_unreadable(state: Path) -> None:
    (state / "step" / "metadata").unlink()
    (state / "step" / "metadata").mkdir()  # reading what is no file is an error of the system's, for root as well


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "code", "expected"),
    [
        (lose_arrays, 0, "The checkpoint of step 20 is damaged: another process could not read it."),
        (make_record_unreadable, 1, "could not be read: another process could not read it It may be undamaged"),
    ],
)
def test_a_state_that_one_process_cannot_read_is_read_by_none(tmp_path, uninterrupted, fault, code, expected):
    states = [tmp_path / f"states {process}" for process in (0, 1)]
    for folder in states:
        shutil.copytree(uninterrupted / "checkpoints", folder)
    fault(states[1] / "20")
    common = [*programs.TINY, "--run-dir", str(tmp_path / "run"), "--max-steps", "18", "--checkpoint-dir"]
    with programs.stopping(programs.start_together([[*common, str(folder)] for folder in states], 2)) as started:
        if code == 0 and programs.wait_until((states[0] / "damaged" / "20").exists, started[0]):
            shutil.rmtree(states[1] / "20")  # as a network disk shows it to a host, later than to the one that did it
        outputs = [" ".join(programs.finish(process, code).split()) for process in started]
    assert expected in outputs[0]
    assert ("is at step 18, the end of --max-steps" in outputs[0]) == (code == 0)
    assert (states[0] / "damaged").exists() == (code == 0)


@pytest.mark.slow
def test_processes_wait_until_they_see_the_same_states(tmp_path, uninterrupted):
    states = [tmp_path / f"states {process}" for process in (0, 1)]
    for folder in states:
        shutil.copytree(uninterrupted / "checkpoints", folder)
    (states[1] / "20").rename(tmp_path / "20")
    common = [*programs.TINY, "--run-dir", str(tmp_path / "run"), "--checkpoint-dir"]
    with programs.stopping(programs.start_together([[*common, str(folder)] for folder in states], 2)) as started:
        assert any("Waiting until" in line for line in iter(started[0].stdout.readline, ""))
        (tmp_path / "20").rename(states[1] / "20")
        outputs = [" ".join(programs.finish(process).split()) for process in started]
    assert "is at step 20, the end of its schedule" in outputs[0]


def test_a_process_that_never_sees_the_states_of_process_0_says_which_it_sees(monkeypatch):
    """As process 1 of two, when process 0 sees another state and has waited long enough."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(checkpoints, "saved_steps", lambda folder: [16, 18])
    monkeypatch.setattr(checkpoints, "from_process_0", lambda mine: ([16, 18, 20], True))
    monkeypatch.setattr(checkpoints, "processes_where", lambda different: [1] if different else [])
    with pytest.raises(checkpoints.CheckpointError, match=r"Processes \[1\] see checkpoints of other steps") as raised:
        checkpoints.wait_for_same_checkpoints("states", 15)
    assert "Process 1 sees in states: 16, 18; process 0 sees: 16, 18, 20." in str(raised.value)


@pytest.mark.slow
def test_one_process_that_fails_ends_both_with_its_message(tmp_path):
    for host in (0, 1):
        for name in ("ant", "bee"):
            (tmp_path / f"host {host}" / name).mkdir(parents=True)
            for index in range(24):
                Image.new("RGB", (16, 16)).save(tmp_path / f"host {host}" / name / f"{index}.png")
    for path in (tmp_path / "host 1").rglob("*.png"):
        path.write_bytes(b"not an image")
    common = [*programs.TINY, "--run-dir", str(tmp_path / "run"), "--data.workers", "0", "--data.source"]
    commands = [[*common, f"folder:{tmp_path / f'host {host}'}"] for host in (0, 1)]
    with programs.stopping(programs.start_together(commands, 2)) as (sound, failing):
        output = programs.finish(failing, code=1)
        assert "not an image" in output
        assert "stack trace" not in output
        start = time.monotonic()
        assert "Another process of the run has ended" in programs.finish(sound, code=1)
        assert time.monotonic() - start < 60, "jax waits for 300 s"


@pytest.mark.slow
def test_a_divergence_ends_both_processes_with_its_own_code(tmp_path):
    # The second step's learning rate overflows the weights.
    diverges = ["--optimizer.warmup-epochs", "2", "--optimizer.learning-rate", "1e30", "--max-skipped", "4"]
    arguments = [*programs.TINY, "--run-dir", str(tmp_path / "run"), *diverges]
    with programs.stopping(programs.start_together(arguments, 2)) as started:
        for process in started:
            assert "no finite gradient" in programs.finish(process, code=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of_process_1", "expected"),
    [
        (
            # A process that looks at its metrics at other steps would notice a divergence at another one.
            ["--optimizer.learning-rate", "0.3", "--log-every", "3"],
            ["optimizer.learning_rate: 0.003 -> 0.3", "log_every: 1 -> 3"],
        ),
        (["--data.source", "folder:fewer"], ["training images: 21 -> 18"]),
        (["--data.source", "folder:others"], ["training images: the same number, but other images"]),
        pytest.param(
            ["--data.augment.resizer", "pillow"], ["data.augment.resizer: 'simd' -> 'pillow'"], marks=needs_simd
        ),
    ],
    ids=["another recipe", "fewer images", "other images", "another resizer"],
)
def test_processes_that_differ_from_process_0_all_end_before_the_first_step(tmp_path, of_process_1, expected):
    for name, images in (("pool", 8), ("fewer", 7), ("others", 8)):
        class_folders(tmp_path / name, images)
    (tmp_path / "others" / "ant" / "0.png").rename(tmp_path / "others" / "ant" / "first.png")
    common = [*programs.TINY, "--run-dir", str(tmp_path / "run"), "--data.workers", "0"]
    common += ["--data.source", f"folder:{tmp_path / 'pool'}"]
    own = [word.replace("folder:", f"folder:{tmp_path}/") for word in of_process_1]
    with programs.stopping(programs.start_together([common, [*common, *own]], 2)) as (first, unlike):
        output = programs.finish(unlike, code=1)
        assert all(difference in output for difference in expected)
        assert "Traceback" not in output
        assert "Other processes differ from process 0: [1]" in programs.finish(first, code=1)


@pytest.mark.slow
def test_a_wrong_address_of_process_0_is_reported(tmp_path):
    flags = "--distributed.coordinator-address 127.0.0.1:9 --distributed.num-processes 2 --distributed.process-id 1"
    arguments = [*programs.TINY, "--run-dir", str(tmp_path / "run"), *flags.split(), "--distributed.timeout", "1"]
    output = programs.run(arguments, code=1)
    assert "Process 0 of the run cannot be reached at 127.0.0.1:9" in output
    assert "Traceback" not in output


def test_a_process_that_never_starts_ends_the_others_with_one_sentence(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    group = ["--distributed.coordinator-address", address, "--distributed.num-processes", "2"]
    group += ["--distributed.process-id", "0", "--distributed.timeout", "2"]
    output = programs.run([*programs.TINY, "--run-dir", str(tmp_path), *group], code=1)
    waiting, error = " ".join(output.split()).split(" error: ")
    others = f"the other processes of the run (2 in all) to connect to process 0 at {address}"
    assert waiting == f"WARNING Waiting for {others}, up to --distributed.timeout 2 s."
    assert error.startswith(f"Waited 2 s (--distributed.timeout) for {others}. Expected")

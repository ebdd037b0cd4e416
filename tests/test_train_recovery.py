"""A run that dies goes on as if nothing had happened. These are real processes, ended by real signals."""

import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import programs
from train import loop
from train.command_line import main
from train.data.sources import open_source
from training import train_losses


def lines(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def saved(run_dir: Path) -> list[int]:
    folder = run_dir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """A run of 20 steps from start to end."""
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    programs.run([*programs.TINY, "--run-dir", str(run_dir)])
    return run_dir


def test_killed_at_random_moments_the_losses_are_those_of_an_uninterrupted_run(tmp_path, uninterrupted):
    kill_at_random_moments(tmp_path / "run", kills=2, seed=0)
    assert train_losses(tmp_path / "run") == train_losses(uninterrupted)


# 124 steps, which a dozen kills do not get through.
LONG = (*programs.TINY, "--optimizer.epochs", "30")


@pytest.fixture(scope="module")
def uninterrupted_long(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted_long")
    programs.run([*LONG, "--run-dir", str(run_dir)])
    return run_dir


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_many_times_the_losses_are_those_of_an_uninterrupted_run(tmp_path, uninterrupted_long, seed):
    kill_at_random_moments(tmp_path / "run", kills=12, seed=100 + seed, program=LONG)
    assert train_losses(tmp_path / "run") == train_losses(uninterrupted_long)


def kill_at_random_moments(run_dir: Path, kills: int, seed: int, program: Sequence[str] = programs.TINY) -> None:
    rng = random.Random(seed)
    arguments = [*program, "--run-dir", str(run_dir), "--save-every", "1"]
    for _ in range(kills):
        target = lines(run_dir) + rng.randrange(1, 6)
        process = programs.start(arguments)
        # Anything from the end of a step to the middle of writing a state.
        programs.wait_until(lambda target=target: lines(run_dir) >= target, process)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        programs.finish(process, code=-signal.SIGKILL)
    programs.run(arguments)


def test_killed_while_a_state_is_written_the_one_before_stands(tmp_path, uninterrupted):
    run_dir = tmp_path / "run"
    arguments = [*programs.TINY, "--run-dir", str(run_dir)]

    def is_writing_the_second_state() -> bool:
        return bool(saved(run_dir)) and any((run_dir / "checkpoints").glob("*tmp*"))

    assert programs.kill_when(is_writing_the_second_state, arguments, signal.SIGKILL) == -signal.SIGKILL
    assert any((run_dir / "checkpoints").glob("*tmp*")), "the moment was missed"
    step = saved(run_dir)[-1]
    assert f"Going on from step {step}" in programs.run(arguments)
    assert not any((run_dir / "checkpoints").glob("*tmp*"))
    assert train_losses(run_dir) == train_losses(uninterrupted)


def test_sigterm_saves_and_exits_with_0(tmp_path, uninterrupted):
    run_dir = tmp_path / "run"
    arguments = [*programs.TINY, "--run-dir", str(run_dir), "--save-every", "1000"]
    process = programs.start(arguments)
    programs.wait_until(lambda: lines(run_dir) >= 3, process)
    process.send_signal(signal.SIGTERM)
    assert "its state is saved" in programs.finish(process, code=0)
    (step,) = saved(run_dir)
    assert f"Going on from step {step}" in programs.run(arguments)
    assert train_losses(run_dir) == train_losses(uninterrupted)


@pytest.mark.parametrize(
    ("save_every", "told"), [("1", "The same command goes on from step "), ("1000", "There is none")]
)
def test_a_stop_amid_steps_without_a_finite_gradient_tells_where_the_run_goes_on(tmp_path, save_every, told):
    run_dir = tmp_path / "run"
    # As below: the second step's learning rate throws the weights out of float32's range.
    never_finite = ["--optimizer.warmup-epochs", "2", "--optimizer.learning-rate", "1e30", "--max-skipped", "1000000"]
    arguments = [*programs.TINY, "--run-dir", str(run_dir), "--optimizer.epochs", "9000", *never_finite]
    process = programs.start([*arguments, "--save-every", save_every])
    programs.wait_until(lambda: lines(run_dir) >= 8, process)
    process.send_signal(signal.SIGTERM)
    output = programs.finish(process, code=0)
    newest = saved(run_dir)[-1] if saved(run_dir) else " from before them"
    assert f"whose states are not saved. {told}{newest}" in output


@pytest.mark.parametrize("seconds", [0.4, 2.5, 4.0])
def test_ctrl_c_before_the_first_step_ends_with_130_and_no_traceback(tmp_path, seconds):
    process = programs.start([*programs.TINY, "--run-dir", str(tmp_path / "run"), "--optimizer.epochs", "9000"])
    time.sleep(seconds)  # amid imports, or the parts of the set-up; on a fast machine, the first steps
    process.send_signal(signal.SIGINT)
    output = programs.finish(process, code=128 + signal.SIGINT)
    assert "stopped" in output.lower()
    assert "Traceback" not in output
    assert "KeyboardInterrupt" not in output


def test_ctrl_c_amid_the_set_up_ends_it_at_its_next_part(tmp_path, monkeypatch, capsys):
    def open_source_interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)  # here an exception might be lost
        return open_source(*arguments)

    monkeypatch.setattr(loop, "open_source", open_source_interrupted)
    monkeypatch.setattr(loop, "assemble", lambda *arguments: pytest.fail("went on"))
    handler = signal.getsignal(signal.SIGINT)
    assert main(["smoke", "--run-dir", str(tmp_path), "--distributed.mode", "off"]) == 128 + signal.SIGINT
    assert "stopped" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_ctrl_c_ends_the_process_at_once(tmp_path):
    program = """
import signal, sys, time
from train.distributed import StopRequest
with StopRequest():
    signal.raise_signal(signal.SIGINT)
    print("noted", flush=True)
    signal.raise_signal(signal.SIGINT)
    print("still there", flush=True)
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=programs.ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (-signal.SIGINT, "noted\n")


def assert_close(found: dict[int, float], wanted: dict[int, float]) -> None:
    """The same images and the same random numbers; only sums are rounded in another order."""
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-5)


def test_a_run_goes_on_with_other_processes_and_devices(tmp_path, uninterrupted):
    run_dir = tmp_path / "run"
    arguments = [*programs.TINY, "--run-dir", str(run_dir), "--mesh.fsdp-min-size", "0"]
    first = programs.start_under_slurm([*arguments, "--max-steps", "8", "--mesh.fsdp", "2"], processes=2)
    with programs.stopping(first):
        outputs = [programs.finish(process) for process in first]
    assert "step 8/8" in outputs[0]
    assert "loss" not in outputs[1], "only process 0 reports"
    programs.run([*arguments, "--max-steps", "14", "--mesh.fsdp", "2"], devices=4)
    programs.run(arguments)
    assert_close(train_losses(run_dir), train_losses(uninterrupted))


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 2), (4, 1)])
def test_several_processes_train_as_one(tmp_path, uninterrupted, processes, devices):
    run_dir = tmp_path / "run"
    together = programs.start_together([*programs.TINY, "--run-dir", str(run_dir)], processes, devices)
    with programs.stopping(together):
        outputs = [programs.finish(process) for process in together]
    assert "Held-out accuracy" in outputs[0]
    assert_close(train_losses(run_dir), train_losses(uninterrupted))


def test_sigterm_to_one_of_two_processes_stops_both_at_one_step(tmp_path):
    run_dir = tmp_path / "run"
    # The checkpoints are all that hosts have to share.
    shared = ["--checkpoint-dir", str(tmp_path / "shared"), "--save-every", "1000", "--optimizer.epochs", "400"]
    arguments = [*programs.TINY, "--run-dir", str(run_dir), *shared]
    with programs.stopping(programs.start_together(arguments, 2)) as started:
        programs.wait_until(lambda: lines(run_dir) >= 3, started[0])
        started[1].send_signal(signal.SIGTERM)
        outputs = [programs.finish(process, code=0) for process in started]
    (step,) = (int(path.name) for path in (tmp_path / "shared").iterdir() if path.name.isdigit())
    assert f"Stopped after step {step}" in outputs[0]


@pytest.fixture
def small_disk(tmp_path):
    """A real file system that is too small for the states of a run."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small disk needs root: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_space(small_disk, uninterrupted):
    run_dir = small_disk / "run"
    arguments = [*programs.TINY, "--run-dir", str(run_dir), "--keep-checkpoints", "100"]
    output = programs.run(arguments, code=1)
    assert re.search(r"error: .*No space left on device", output)
    assert "Traceback" not in output
    step = saved(run_dir)[-1]
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    assert f"Going on from step {step}" in programs.run(arguments)
    assert train_losses(run_dir) == train_losses(uninterrupted)


def test_a_finished_run_is_not_trained_again(tmp_path, uninterrupted):
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    before = train_losses(run_dir)
    assert "Held-out accuracy" in programs.run([*programs.TINY, "--run-dir", str(run_dir)])
    assert train_losses(run_dir) == before


def test_another_recipe_does_not_go_on_with_a_run(tmp_path, uninterrupted):
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    arguments = [*programs.TINY, "--run-dir", str(run_dir), "--optimizer.learning-rate", "0.5"]
    output = programs.run(arguments, code=1)
    assert "optimizer.learning_rate: 0.003 -> 0.5" in output
    assert "--run-dir" in output


def test_a_run_does_not_go_on_with_the_checkpoints_of_another_folders_run(tmp_path, uninterrupted):
    folder = tmp_path / "checkpoints"
    shutil.copytree(uninterrupted / "checkpoints", folder)
    arguments = [*programs.TINY, "--run-dir", str(tmp_path / "b"), "--checkpoint-dir", str(folder)]
    before = sorted(folder.rglob("*"))
    output = programs.run([*arguments, "--optimizer.learning-rate", "0.5"], code=1)
    assert "optimizer.learning_rate: 0.003 -> 0.5" in output
    assert sorted(folder.rglob("*")) == before
    assert not (tmp_path / "b").exists()
    # Moved to another place it is still the same run.
    assert "Going on from step 20" in programs.run([*arguments, "--max-steps", "20"])


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


def test_a_wrong_address_of_process_0_is_told(tmp_path):
    flags = "--distributed.coordinator-address 127.0.0.1:9 --distributed.num-processes 2 --distributed.process-id 1"
    arguments = [*programs.TINY, "--run-dir", str(tmp_path / "run"), *flags.split(), "--distributed.timeout", "1"]
    output = programs.run(arguments, code=1)
    assert "Process 0 of the run cannot be reached at 127.0.0.1:9" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("shared", ["--run-dir", "--checkpoint-dir"])
def test_two_runs_at_a_time_do_not_share_a_folder(tmp_path, shared):
    def arguments(number: int) -> list[str]:
        folders = {"--run-dir": f"run {number}", "--checkpoint-dir": "checkpoints", shared: "shared"}
        flags = [word for flag, name in folders.items() for word in (flag, str(tmp_path / name))]
        return [*programs.TINY, *flags, "--optimizer.epochs", "9000"]

    reports = tmp_path / ("shared" if shared == "--run-dir" else "run 1")
    with programs.stopping([programs.start(arguments(1))]) as (first,):
        programs.wait_until(lambda: lines(reports) >= 3, first)
        output = programs.run(arguments(2), code=1)
        assert f"A run is going on in {tmp_path / 'shared'}." in output
        assert "Traceback" not in output
        first.send_signal(signal.SIGKILL)
        programs.finish(first, code=-signal.SIGKILL)
    # A killed run leaves no lock behind.
    assert "Going on from step" in programs.run([*arguments(1), "--max-steps", "1"])


def test_a_run_does_not_go_on_with_other_classes_or_images(tmp_path):
    pool, run_dir = tmp_path / "pool", tmp_path / "run"
    for number, name in enumerate(("ant", "bee", "cat")):
        (pool / name).mkdir(parents=True)
        for index in range(8):
            Image.new("RGB", (16, 16), (80 * number, 10 * index, 0)).save(pool / name / f"{index}.png")
    arguments = [*programs.TINY, "--run-dir", str(run_dir), "--data.source", f"folder:{pool}", "--data.workers", "0"]
    programs.run([*arguments, "--max-steps", "2"])
    metrics = (run_dir / "metrics.jsonl").read_text()

    def refused() -> str:
        output = programs.run([*arguments, "--max-steps", "4"], code=1)
        assert (run_dir / "metrics.jsonl").read_text() == metrics
        assert saved(run_dir) == [2]
        return output

    (pool / "ant").rename(pool / "zebra")
    assert "classes: gone: ant; new: zebra" in refused()
    (pool / "zebra").rename(pool / "ant")

    shutil.copytree(pool / "ant", pool / "dog")
    output = refused()
    assert "classes: new: dog" in output
    assert "training images: 21 -> 28" in output
    shutil.rmtree(pool / "dog")
    assert "Going on from step 2" in programs.run([*arguments, "--max-steps", "4"])


def test_a_gradient_that_stays_infinite_stops_the_run_and_the_last_good_state_stands(tmp_path):
    run_dir = tmp_path / "run"
    # The second step's learning rate throws the weights out of float32's range.
    arguments = [*programs.TINY, "--run-dir", str(run_dir), "--optimizer.warmup-epochs", "2", "--max-skipped", "4"]
    output = programs.run([*arguments, "--optimizer.learning-rate", "1e30", "--save-every", "1"], code=1)
    assert "no finite gradient" in output
    assert "--optimizer.learning-rate" in output
    losses = train_losses(run_dir)
    assert saved(run_dir)[-1] < max(losses)
    assert None not in [losses[step] for step in saved(run_dir)]
    assert losses[max(losses)] is None


def test_a_run_does_not_begin_again_when_its_checkpoint_dir_is_forgotten(tmp_path):
    run_dir, states = tmp_path / "run", tmp_path / "states"
    arguments = [*programs.TINY, "--run-dir", str(run_dir)]
    programs.run([*arguments, "--checkpoint-dir", str(states), "--max-steps", "2"])
    metrics = (run_dir / "metrics.jsonl").read_text()
    output = programs.run([*arguments, "--max-steps", "4"], code=1)
    assert f"--checkpoint-dir {states}" in output.replace("\n", " ")
    assert (run_dir / "metrics.jsonl").read_text() == metrics
    assert not (run_dir / "checkpoints").exists()
    assert "Going on from step 2" in programs.run([*arguments, "--checkpoint-dir", str(states), "--max-steps", "4"])

"""A run that is killed or stopped resumes as if nothing had happened: real processes, ended by real signals."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import programs
from train import loop
from train.command_line import main
from train.data import open_source
from training import disk, lines, saved, train_losses, unbalanced_tables

# More epochs than the kills get through.
EVERY_OPTION = (
    *("--optimizer.epochs", "10"),
    *("--optimizer.name", "lamb", "--optimizer.ema-warmup", "--optimizer.learning-rate", "0.05"),
    *("--optimizer.freeze", "stem", "--keep-best", "top1", "--patience", "100", "--evaluate-every", "1"),
    *("--data.class-weights", "balanced", "--data.augment.vertical-flip", "0.5"),
    *("--data.augment.color-jitter", "0.4", "0.4", "0.4", "0.1"),
)
# Class weights exclude balanced sampling, and features that are computed once exclude augmentation.
HEAD_ONLY = (
    *("--optimizer.epochs", "30"),
    *("--optimizer.name", "lion", "--optimizer.ema-warmup", "--optimizer.freeze", "backbone"),
    *("--model.drop-path-rate", "0", "--model.dropout-rate", "0", "--model.head-dropout-rate", "0.2"),
    *("--data.augment.crop", "evaluation", "--data.augment.horizontal-flip", "0", "--data.held-out", "0.2"),
    *("--data.source", "labels:TABLES/labels.csv", "--data.sampling", "balanced"),
    *("--keep-best", "balanced-accuracy", "--patience", "12", "--evaluate-every", "1"),
)


@pytest.mark.slow
@pytest.mark.parametrize(("options", "kills"), [(EVERY_OPTION, 4), (HEAD_ONLY, 2)], ids=["every option", "head only"])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path, options, kills):
    unbalanced_tables(tmp_path)
    program = [word.replace("TABLES", str(tmp_path)) for word in (*programs.TINY, *options)]
    output = programs.run([*program, "--run-dir", str(tmp_path / "uninterrupted")])
    assert ("computed once" in output) == (options is HEAD_ONLY)
    kill_at_random_moments(tmp_path / "run", kills, seed=11, program=program)
    losses = train_losses(tmp_path / "run")
    assert losses == train_losses(tmp_path / "uninterrupted")
    if options is HEAD_ONLY:
        assert len(losses) < 90, "--patience ends the run"
    for name in ("evaluation.json", "flax_model.safetensors"):
        for folder in ("model", "model-ema"):
            found = [(tmp_path / run / folder / name).read_bytes() for run in ("run", "uninterrupted")]
            assert found[0] == found[1]
    report = json.loads((tmp_path / "run" / "model" / "evaluation.json").read_text())
    assert 0 < report["step"] < max(losses)


def kill_at_random_moments(run_dir: Path, kills: int, seed: int, program: Sequence[str]) -> None:
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


@pytest.fixture
def resume(monkeypatch, capsys, shared_programs):
    """Resumes a run on the eight devices of this process; what it prints."""

    def resume(arguments: Sequence[str]) -> str:
        assert main([*arguments, "--distributed.mode", "off"]) == 0
        return "".join(capsys.readouterr())

    monkeypatch.setenv("COLUMNS", "120")
    return resume


@pytest.mark.slow
def test_killed_while_a_state_is_written_it_resumes_from_the_one_before(tmp_path, uninterrupted, resume):
    run_dir = tmp_path / "run"
    arguments = [*programs.TINY, "--run-dir", str(run_dir)]

    def is_writing_the_second_state() -> bool:
        return bool(saved(run_dir)) and any((run_dir / "checkpoints").glob("*tmp*"))

    assert programs.kill_when(is_writing_the_second_state, arguments, signal.SIGKILL, devices=8) == -signal.SIGKILL
    assert any((run_dir / "checkpoints").glob("*tmp*")), "the moment was missed"
    step = saved(run_dir)[-1]
    assert f"Resuming from step {step}" in resume(arguments)
    assert not any((run_dir / "checkpoints").glob("*tmp*"))
    assert train_losses(run_dir) == train_losses(uninterrupted)


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_0(tmp_path, uninterrupted, resume):
    run_dir = tmp_path / "run"
    arguments = [*programs.TINY, "--run-dir", str(run_dir), "--save-every", "1000"]
    process = programs.start(arguments, devices=8)
    programs.wait_until(lambda: lines(run_dir) >= 3, process)
    process.send_signal(signal.SIGTERM)
    assert "its state is saved" in programs.finish(process, code=0)
    (step,) = saved(run_dir)
    assert f"Resuming from step {step}" in resume(arguments)
    assert train_losses(run_dir) == train_losses(uninterrupted)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)])
def test_workers_that_wait_for_the_next_evaluation_end_with_the_run(tmp_path, number, code):
    run_dir = tmp_path / "run"
    endless = ["--optimizer.epochs", "9000", "--evaluate-every", "1", "--data.workers", "1"]
    with programs.stopping([programs.start([*programs.TINY, "--run-dir", str(run_dir), *endless])]) as (process,):
        programs.wait_until(lambda: '"kind": "train"' in after_an_evaluation(run_dir), process)
        workers = programs.workers_of(process.pid)
        assert len(workers) == 2, "one makes training's batches, the other those of the next evaluation"
        process.send_signal(number)
        programs.finish(process, code)
    programs.wait_for_the_end_of(workers)


def after_an_evaluation(run_dir: Path) -> str:
    """The lines of a run's metrics.jsonl after its first evaluation."""
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_text().partition('"kind": "evaluation"')[2] if metrics.exists() else ""


@pytest.mark.slow
def test_a_run_stopped_among_skipped_steps_saves_and_resumes_their_count(tmp_path):
    run_dir = tmp_path / "run"
    # As below: the second step's learning rate overflows the weights.
    never_finite = ["--optimizer.warmup-epochs", "2", "--optimizer.learning-rate", "1e30", "--save-every", "1"]
    arguments = [*programs.TINY, "--run-dir", str(run_dir), "--optimizer.epochs", "9000", *never_finite]
    process = programs.start([*arguments, "--max-skipped", "1000000"])
    programs.wait_until(lambda: lines(run_dir) >= 8, process)
    process.send_signal(signal.SIGTERM)
    output = programs.finish(process, code=0)
    *before, newest = saved(run_dir)
    assert f"Stopped after step {newest}; its state is saved." in output
    record = json.loads((run_dir / "checkpoints" / str(newest) / "step" / "metadata").read_text())
    assert before == [newest - record["skipped_in_a_row"] - 1, newest - record["skipped_in_a_row"]]
    limit = record["skipped_in_a_row"] + 2
    output = programs.run([*arguments, "--max-skipped", str(limit)], code=3)
    assert f"Resuming from step {newest}" in output
    assert f"{limit} steps in a row, up to step {newest + 2}" in output
    assert saved(run_dir) == [*before, newest]


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.4, 2.5])
def test_ctrl_c_before_the_first_step_ends_with_130_and_no_traceback(tmp_path, seconds):
    process = programs.start([*programs.TINY, "--run-dir", str(tmp_path / "run"), "--optimizer.epochs", "9000"])
    time.sleep(seconds)  # during imports or the set-up; on a fast machine, the first steps
    process.send_signal(signal.SIGINT)
    output = programs.finish(process, code=128 + signal.SIGINT)
    assert "stopped" in output.lower()
    assert "Traceback" not in output
    assert "KeyboardInterrupt" not in output


def test_ctrl_c_during_the_set_up_ends_it_before_its_next_part(tmp_path, monkeypatch, capsys):
    def open_source_interrupted(*arguments):
        if not opened:  # a second signal would end this process
            signal.raise_signal(signal.SIGINT)
        opened.append(open_source(*arguments))
        return opened[-1]

    opened = []

    monkeypatch.setattr(loop, "open_source", open_source_interrupted)
    monkeypatch.setattr(loop, "make_parts", lambda *arguments: pytest.fail("went on"))
    handler = signal.getsignal(signal.SIGINT)
    assert main(["smoke", "--run-dir", str(tmp_path), "--distributed.mode", "off"]) == 128 + signal.SIGINT
    assert "stopped" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_process_at_once(tmp_path):
    program = """
import signal, sys, time
from train.compute.preemption import StopRequest
with StopRequest():
    signal.raise_signal(signal.SIGINT)
    print("noted", flush=True)
    signal.raise_signal(signal.SIGINT)
    print("still there", flush=True)
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=programs.ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (-signal.SIGINT, "noted\n")


@pytest.fixture
def small_disk(tmp_path):
    """A real file system that is too small for the states of a run."""
    with disk(tmp_path / "disk", megabytes=1) as folder:
        yield folder


@pytest.mark.slow
def test_a_full_disk_stops_the_run_which_resumes_when_there_is_space(small_disk, uninterrupted, resume):
    run_dir = small_disk / "run"
    arguments = [*programs.TINY, "--run-dir", str(run_dir), "--keep-checkpoints", "100"]
    output = programs.run(arguments, code=1, devices=8)
    assert "No space left on device" in output[output.index("\nerror: ") :]
    assert "Traceback" not in output
    step = saved(run_dir)[-1]
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    assert f"Resuming from step {step}" in resume(arguments)
    assert train_losses(run_dir) == train_losses(uninterrupted)


@pytest.mark.slow
def test_a_gradient_that_stays_infinite_stops_the_run_and_keeps_the_last_good_state(tmp_path, capsys):
    run_dir = tmp_path / "run"
    # The second step's learning rate overflows the weights.
    arguments = [*programs.TINY, "--run-dir", str(run_dir), "--optimizer.warmup-epochs", "2", "--max-skipped", "4"]
    assert (
        main([*arguments, "--optimizer.learning-rate", "1e30", "--save-every", "1", "--distributed.mode", "off"]) == 3
    )
    output = capsys.readouterr().err
    assert "no finite gradient" in output
    assert "--optimizer.learning-rate" in output
    losses = train_losses(run_dir)
    assert saved(run_dir)[-1] < max(losses)
    assert None not in [losses[step] for step in saved(run_dir)]
    assert losses[max(losses)] is None

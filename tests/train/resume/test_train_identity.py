"""A run folder is resumed only by its run: not with another recipe, classes or images, nor twice at a time."""

import dataclasses
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

import programs
from train.command_line import main
from train.config import TrainConfig
from train.data import HostAugmentation, open_source
from train.folders import lock_folder
from train.resume import run_comparison
from train.resume.checkpoints import Checkpoints
from train.resume.run_comparison import changed_fields, current_fields, identify, network_to_dict
from train.resume.same_run import find_run
from training import class_folders, first_state, saved, sharded, steps_in, tiny, train_losses


@pytest.fixture
def run(capsys, monkeypatch, shared_programs):
    """Runs a command line in this process, which saves seconds of starting another, and returns what it prints."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(arguments: Sequence[str], code: int = 0) -> str:
        assert main([*arguments, "--distributed.mode", "off"]) == code
        return "".join(capsys.readouterr())

    return run


def test_a_finished_run_is_not_trained_again(tmp_path, uninterrupted, run):
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    before = train_losses(run_dir)
    assert "Held-out accuracy" in run([*programs.TINY, "--run-dir", str(run_dir)])
    assert train_losses(run_dir) == before


def test_another_recipe_does_not_resume_a_run(tmp_path, uninterrupted, run):
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    arguments = [*programs.TINY, "--run-dir", str(run_dir), "--optimizer.learning-rate", "0.5"]
    output = run(arguments, code=1)
    assert "optimizer.learning_rate: 0.003 -> 0.5" in output
    assert "--run-dir" in output


def test_a_run_does_not_resume_from_another_runs_checkpoints(tmp_path, uninterrupted, run):
    folder = tmp_path / "checkpoints"
    shutil.copytree(uninterrupted / "checkpoints", folder)
    arguments = [*programs.TINY, "--run-dir", str(tmp_path / "b"), "--checkpoint-dir", str(folder)]
    before = sorted(folder.rglob("*"))
    output = run([*arguments, "--optimizer.learning-rate", "0.5"], code=1)
    assert "optimizer.learning_rate: 0.003 -> 0.5" in output
    assert sorted(folder.rglob("*")) == before
    assert not (tmp_path / "b").exists()
    # Moved to another place it is still the same run.
    expected = "at step 20, the end of --max-steps: nothing is left to train"
    assert expected in run([*arguments, "--max-steps", "20"])


@pytest.mark.slow
def test_a_run_resumes_if_its_data_moved_but_not_with_other_classes_or_images(tmp_path, run):
    before, pool, run_dir = tmp_path / "before", tmp_path / "pool", tmp_path / "run"
    class_folders(before, 8)
    common = [*programs.TINY, "--run-dir", str(run_dir), "--data.workers", "0", "--data.source"]
    run([*common, f"folder:{before}", "--max-steps", "2"])
    before.rename(pool)
    arguments = [*common, f"folder:{pool}", "--max-steps", "4"]
    metrics = (run_dir / "metrics.jsonl").read_text()

    def refused() -> str:
        output = run(arguments, code=1)
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

    (pool / "ant" / "1.png").rename(pool / "ant" / "another.png")
    assert "the same number, but other images" in refused()
    (pool / "ant" / "another.png").rename(pool / "ant" / "1.png")
    assert "Resuming from step 2" in run(arguments)


@pytest.mark.parametrize(("first", "then"), [("simd", "pillow"), ("pillow", "simd")])
def test_a_run_does_not_resume_with_another_resizer(tmp_path, monkeypatch, first, then):
    """Also if the recipe says "auto". Naming the resizer that "auto" chose changes nothing."""

    def choose(installed):
        monkeypatch.setattr(run_comparison, "choose_resizer", lambda wanted: installed if wanted == "auto" else wanted)

    def named(resizer):
        return tiny(tmp_path / "run", data__augment=HostAugmentation(randaugment="none", resizer=resizer))

    choose(first)
    source = open_source(named("auto").data, "train")
    run = identify(named("auto"), source) | {"network": network_to_dict(tiny().model)}
    with Checkpoints(named("auto").checkpoints, run) as checkpoints:
        checkpoints.save(first_state(tiny(mesh=sharded(1, 1))))
    find_run(named("auto"), source)
    choose(then)
    with pytest.raises(ValueError, match=rf"What differs:\n  data\.augment\.resizer: '{first}' -> '{then}'\n"):
        find_run(named("auto"), source)
    find_run(named(first), source)


@pytest.mark.slow
def test_a_run_does_not_start_again_if_its_checkpoint_dir_is_forgotten(tmp_path, run):
    run_dir, states = tmp_path / "run", tmp_path / "states"
    arguments = [*programs.TINY, "--run-dir", str(run_dir)]
    run([*arguments, "--checkpoint-dir", str(states), "--max-steps", "2"])
    metrics = (run_dir / "metrics.jsonl").read_text()
    output = run([*arguments, "--max-steps", "4"], code=1)
    assert f"--checkpoint-dir {states}" in output.replace("\n", " ")
    assert (run_dir / "metrics.jsonl").read_text() == metrics
    assert not (run_dir / "checkpoints").exists()
    assert "Resuming from step 2" in run([*arguments, "--checkpoint-dir", str(states), "--max-steps", "4"])


def test_the_model_of_a_finished_run_is_not_replaced(tmp_path, uninterrupted, run):
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    output = run([*programs.TINY, "--run-dir", str(run_dir), "--seed", "7", "--max-steps", "1"], code=1)
    assert f"{run_dir} holds the model of a finished run" in output
    assert "another folder with --run-dir" in output
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_tilde_in_run_dir_and_checkpoint_dir_is_the_home(tmp_path, monkeypatch, run):
    """Shells leave the "~" of --run-dir=~/run as it is."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    common = [*programs.TINY, "--max-steps", "1"]
    run([*common, "--run-dir=~/run"])
    assert {"metrics.jsonl", "model", "checkpoints"} <= {path.name for path in (tmp_path / "home" / "run").iterdir()}
    run([*common, "--run-dir=~/other", "--checkpoint-dir=~/states"])
    assert steps_in(tmp_path / "home" / "states") == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_folder_that_no_checkpoint_can_be_written_to_is_refused_when_the_config_is_made():
    with pytest.raises(ValueError, match=r"checkpoint_dir='caf.udce9': expected a path in UTF-8"):
        tiny(Path("run"), checkpoint_dir=os.fsdecode(b"caf\xe9"))


def test_an_unknown_home_is_refused_when_the_config_is_made():
    with pytest.raises(ValueError, match="run_dir='~nobody of this name/run': this machine has no such home"):
        tiny(Path("~nobody of this name/run"))


@pytest.mark.parametrize("used", ["run", "states"])
def test_a_folder_that_another_run_uses_is_refused(tmp_path, used, run):
    arguments = [*programs.TINY, "--run-dir", str(tmp_path / "run"), "--checkpoint-dir", str(tmp_path / "states")]
    with lock_folder(tmp_path / used, "locked twice"):
        assert f"Another run is using {tmp_path / used}." in run(arguments, code=1)


@pytest.mark.slow
def test_two_runs_cannot_use_a_folder_at_the_same_time_and_a_killed_one_leaves_no_lock(tmp_path, run):
    arguments = [*programs.TINY, "--checkpoint-dir", str(tmp_path / "states"), "--optimizer.epochs", "9000"]
    with programs.stopping([programs.start([*arguments, "--run-dir", str(tmp_path / "1")])]) as (first,):
        programs.wait_until(lambda: bool(steps_in(tmp_path / "states")), first)
        output = run([*arguments, "--run-dir", str(tmp_path / "2")], code=1)
        assert f"Another run is using {tmp_path / 'states'}." in output
        assert "Traceback" not in output
        first.send_signal(signal.SIGKILL)
        programs.finish(first, code=-signal.SIGKILL)
    assert "the end of --max-steps" in run([*arguments, "--run-dir", str(tmp_path / "1"), "--max-steps", "1"])


def test_fields_that_change_no_step_may_differ():
    before = tiny(Path("a")).to_dict()
    free = tiny(Path("b"), mesh__fsdp=2, save_every=7, data__workers=3, max_steps=5)
    assert changed_fields(before, free.to_dict()) == []
    assert changed_fields(before, tiny(Path("a"), optimizer__accumulate=2).to_dict()) == []
    changed = tiny(Path("a"), optimizer__beta2=0.99, data__seed=7, seed=3).to_dict()
    names = [line.partition(":")[0] for line in changed_fields(before, changed)]
    assert names == ["data.seed", "optimizer.beta2", "seed"]


@dataclasses.dataclass(frozen=True)
class _Later(TrainConfig):
    """Recipes of a later version, with names that begin as others do."""

    remat_policy: str = "all"
    mesh_kind: str = "flat"


def _later(config: TrainConfig, **changes: str) -> _Later:
    return _Later(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)}, **changes)


def test_a_field_is_free_to_change_by_its_whole_name_only():
    before, now = _later(tiny()).to_dict(), _later(tiny(remat=True), remat_policy="some", mesh_kind="cube").to_dict()
    assert changed_fields(before, now) == ["remat_policy: 'all' -> 'some'", "mesh_kind: 'flat' -> 'cube'"]


def test_a_missing_field_has_its_default_and_an_unknown_one_is_named():
    noted = tiny(data__seed=7).to_dict()
    later = _later(tiny(data__seed=7), mesh_kind="cube")
    values, unknown = current_fields(noted, later)
    assert changed_fields(values, later.to_dict()) == ["mesh_kind: 'flat' -> 'cube'"]
    assert unknown == []
    values, unknown = current_fields(later.to_dict(), tiny(data__seed=8))
    assert changed_fields(values, tiny(data__seed=8).to_dict()) == ["data.seed: 7 -> 8"]
    assert unknown == ["remat_policy: 'all'", "mesh_kind: 'cube'"]


def test_a_run_of_a_version_with_adamw_alone_resumes_and_records_hold_the_values_that_are_used():
    before = tiny().to_dict()
    assert (before["optimizer"]["beta2"], before["optimizer"]["epsilon"]) == (0.999, 1e-8)
    for name in ("name", "schedule", "ema_warmup"):
        del before["optimizer"][name]
    values, _ = current_fields(before, tiny())
    assert changed_fields(values, tiny().to_dict()) == []
    lamb = tiny(optimizer__name="lamb").to_dict()["optimizer"]
    assert (lamb["beta2"], lamb["epsilon"], lamb["clip_norm"]) == (0.999, 1e-6, 1.0)

"""How a run starts, resumes and ends, and which files it leaves: tiny runs in this process."""

import dataclasses
import errno
import io
import json
import shutil

import pytest
from etils import epath
from rich.console import Console

import train
from poolformer_jax import InputError, PoolFormerConfig, save_pretrained
from small_networks import random_variables
from train import loop
from train.compute.preemption import StopRequest
from train.config import PretrainedNetwork
from train.report import results
from train.report.journal import MetricsFile
from train.resume.checkpoints import newest_run
from train.resume.record import read_record
from training import (
    DATA,
    NETWORK,
    ONE_STAGE,
    class_folders,
    run,
    saved,
    sharded,
    tiny,
    train_losses,
    without_a_finite_gradient,
)

pytestmark = pytest.mark.usefixtures("shared_programs")


def small(run_dir, **changes):
    return tiny(run_dir, mesh=sharded(8, 1), log_every=2, **changes)


def fine_tuning(run_dir, weights, **changes):
    data = dataclasses.replace(DATA, image_mean=(0.5,) * 3, image_std=(0.25,) * 3)
    return small(run_dir, model=PretrainedNetwork(str(weights)), data=data, **changes)


def full_disk(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.slow
def test_a_finished_run_that_is_started_again_writes_no_line_twice(tmp_path):
    config = small(tmp_path, max_steps=2)
    run(config)
    noted = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line)["kind"] for line in noted.splitlines()] == ["train", "evaluation", "evaluation_ema"]
    assert run(config).evaluations.keys() == {"params", "ema"}
    assert (tmp_path / "metrics.jsonl").read_text() == noted


def evaluations(run_dir, kind="evaluation"):
    noted = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in noted if line["kind"] == kind}


@pytest.mark.slow  # compiles a separate training step
def test_the_best_weights_are_published_and_a_stopped_run_keeps_the_same_ones(tmp_path, monkeypatch):
    def train(name, *stops):
        # Learning this fast, the network gets worse at times.
        config = small(tmp_path / name, model=NETWORK, keep_best="top1", optimizer__learning_rate=0.1, save_every=1000)
        for steps in stops:
            with monkeypatch.context() as patch:
                patch.setattr(StopRequest, "at", lambda stop, step, last=steps: step == last)
                run(config)
        fingerprints = read_record(epath.Path(tmp_path / name / "checkpoints"), 12)["fingerprints"]
        assert any(name.startswith("best/ema/params/") for name in fingerprints)
        return fingerprints

    assert train("whole", 99) == train("stopped", 3, 7, 99)  # 3: the state is saved, and its evaluation is due
    for folder, kind in (("model", "evaluation"), ("model-ema", "evaluation_ema")):
        found = [
            json.loads((tmp_path / name / folder / "evaluation.json").read_text()) for name in ("whole", "stopped")
        ]
        assert found[0] == found[1]
        noted = evaluations(tmp_path / "whole", kind)
        best = max(noted, key=lambda step: noted[step]["top1"])  # the first of the best
        assert (found[0]["step"], found[0]["top1"]) == (best, noted[best]["top1"])
        weights = [(tmp_path / name / folder / "flax_model.safetensors").read_bytes() for name in ("whole", "stopped")]
        assert weights[0] == weights[1]
    assert json.loads((tmp_path / "whole" / "model" / "evaluation.json").read_text())["step"] < 12


@pytest.mark.slow  # compiles a separate training step
def test_a_run_without_a_better_evaluation_ends_early_and_is_finished(tmp_path):
    options = {"keep_best": "loss", "patience": 2, "optimizer__learning_rate": 0.3, "optimizer__epochs": 12}
    config = small(tmp_path, model=NETWORK, **options)
    first = run(config)
    assert 6 < first.step < 36
    # The step of the best loss, and the last one that it is kept for, by kind of weights.
    best = {}
    for kind in ("evaluation", "evaluation_ema"):
        noted = evaluations(tmp_path, kind)
        best[kind] = min(noted, key=lambda step: noted[step]["loss"])
    assert first.step == max(best.values()) + 2 * 3  # 3 steps are an epoch
    assert json.loads((tmp_path / "finished.json").read_text()) == {"step": first.step}
    assert json.loads((tmp_path / "model" / "evaluation.json").read_text())["step"] == best["evaluation"]
    assert run(config).step == first.step


@pytest.mark.slow
def test_a_run_that_dies_in_an_evaluation_has_saved_and_evaluates_when_resumed(tmp_path, monkeypatch):
    def die(*arguments):
        raise MemoryError

    config = small(tmp_path, max_steps=4, save_every=1000)  # 3 steps are an epoch
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(loop, "evaluate", die)
        run(config)
    assert saved(tmp_path) == [3]
    run(config)
    noted = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in noted if line["kind"] == "evaluation"] == [3, 4]
    assert [line["step"] for line in noted if line["kind"] == "train"] == [2, 4]
    with MetricsFile(tmp_path, start_step=3) as metrics:
        assert metrics.has_evaluation(3)


@pytest.mark.slow
def test_fit_reports_to_a_function_and_uploads_the_model_with_a_card_of_the_figures(tmp_path, monkeypatch, capsys):
    def upload(repository, save):
        folder = tmp_path / repository
        folder.mkdir(parents=True)
        save(folder)
        return "https://the-address"

    monkeypatch.setattr(results, "push_to_hub", upload)
    logged = []
    config = small(tmp_path / "run", max_steps=2, push_to_hub="me/digits")
    outcome = train.fit(config, lambda *line: logged.append(line))
    assert (outcome.step, outcome.evaluations["params"].examples) == (2, 96)
    assert train.read_recipe_file(tmp_path / "run" / "recipe.json").to_dict() == config.to_dict()
    noted = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step for step, _ in logged] == [line["step"] for line in noted]
    assert logged[0][1]["train/loss"] == noted[0]["loss"]
    assert "https://the-address" in capsys.readouterr().out
    uploaded = {path.name for path in (tmp_path / "me" / "digits").iterdir()}
    assert uploaded > {"report.html", "evaluation.json", "flax_model.safetensors", "config.json"}
    card = (tmp_path / "me" / "digits" / "README.md").read_text()
    report = json.loads((tmp_path / "run" / "model" / "evaluation.json").read_text())
    assert "# digits" in card
    for name in ("top1", "f1", "calibration_error", "calibration_error_with_temperature"):
        assert f"| {name} | {report[name]:.4g} |" in card

    def refuse(*_):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(results, "push_to_hub", refuse)
    with pytest.raises(InputError, match=r"run/model, but its upload to me/digits failed: Name or service not known\n"):
        train.fit(config)  # the finished run only uploads


@pytest.fixture
def weights(tmp_path):
    """A model folder of three classes, with three channels and a stride of 4."""
    fields = {field.name: getattr(ONE_STAGE, field.name) for field in dataclasses.fields(PoolFormerConfig)}
    model, variables = random_variables(PoolFormerConfig(**fields | {"num_labels": 3}))
    save_pretrained(tmp_path / "weights", model, variables)
    return tmp_path / "weights"


@pytest.mark.slow
def test_a_fine_tuning_run_resumes_without_its_pretrained_weights(tmp_path, weights):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run(fine_tuning(whole, weights, max_steps=4))
    run(fine_tuning(parted, weights, max_steps=2))
    shutil.rmtree(weights)
    assert run(fine_tuning(parted, weights, max_steps=4)).step == 4
    assert train_losses(parted) == train_losses(whole)
    for name in ("config.json", "preprocessor_config.json", "flax_model.safetensors"):
        assert (parted / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()
    with pytest.raises(FileNotFoundError):
        run(fine_tuning(tmp_path / "new", weights, seed=7))  # not one of the programs above


@pytest.mark.slow
def test_a_run_without_its_checkpoints_says_that_it_starts_again(tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "at", lambda stop, step: step == 4)
        run(small(tmp_path))
    assert not caplog.records  # a new run logs none
    shutil.rmtree(tmp_path / "checkpoints")
    run(small(tmp_path, max_steps=2))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    expected = record.getMessage()
    assert f"{tmp_path} has metrics up to step 4, but {tmp_path / 'checkpoints'} has no checkpoint" in expected
    assert "It starts again from step 0, and so do its metrics." in expected
    assert list(train_losses(tmp_path)) == [2]
    run(small(tmp_path, max_steps=4))
    assert len(caplog.records) == 1  # a run that resumes logs none


def test_a_split_smaller_than_a_batch_and_files_that_are_passed_over_are_reported(tmp_path, monkeypatch, caplog):
    def stop(*arguments, **options):
        raise InterruptedError

    class_folders(tmp_path / "photos", images=4)
    (tmp_path / "photos" / "ant" / "notes.txt").touch()
    monkeypatch.setattr(loop, "make_parts", stop)
    screen = io.StringIO()
    with pytest.raises(InterruptedError):
        loop.run(tiny(tmp_path / "run", data__source=f"folder:{tmp_path / 'photos'}"), Console(file=screen))
    assert screen.getvalue() == f"folder:{tmp_path / 'photos'}: passed over 1 other file: 1 .txt\n"
    assert [record.getMessage() for record in caplog.records] == [
        "The split train has 9 images, fewer than a batch of 32: every batch repeats images, and each step counts as "
        "an epoch. Use a smaller --data.batch-size."
    ]


@pytest.mark.slow
def test_the_checkpoints_may_lie_in_the_folder_of_the_run_itself(tmp_path):
    run_dir = tmp_path / "run"
    config = small(run_dir, max_steps=2, checkpoint_dir=f"{tmp_path}/other/../run")
    assert run(config).step == 2
    assert newest_run(run_dir)[0] == 2
    assert run(config).step == 2
    assert (run_dir / "model" / "config.json").exists()


@pytest.mark.slow
def test_keep_every_saves_checkpoints_that_are_never_deleted(tmp_path):
    run(small(tmp_path, max_steps=6, save_every=1000, keep_checkpoints=1, keep_every=2))
    assert saved(tmp_path) == [2, 4, 6]
    run(small(tmp_path, max_steps=9, save_every=1, keep_checkpoints=1, keep_every=4))
    assert saved(tmp_path) == [4, 8, 9]
    assert list(train_losses(tmp_path)) == [2, 4, 6, 8, 9]  # saving within an interval of two steps does not split it


def test_a_stopped_run_reports_its_last_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(StopRequest, "at", lambda stop, step: step == 5)
    run(small(tmp_path, save_every=1000, evaluate_every=1000))
    assert (list(train_losses(tmp_path)), saved(tmp_path)) == ([2, 4, 5], [5])


@pytest.mark.slow
def test_finished_json_is_written_last_at_the_end_of_the_schedule(tmp_path, monkeypatch):
    finished = tmp_path / "finished.json"
    run(small(tmp_path, max_steps=2))
    assert not finished.exists()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(results, "write_examples", full_disk)
        run(small(tmp_path))
    assert not finished.exists()
    run(small(tmp_path))
    assert json.loads(finished.read_text()) == {"step": 12}


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_profile_is_written_even_if_the_run_ends_during_it(tmp_path, steps, caplog):
    run(small(tmp_path, max_steps=12, profile_steps=steps, save_every=1000, evaluate_every=1000))
    assert ("12 steps are left, and the first 10 are not profiled" in caplog.text) == (steps > 2)
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size


@pytest.mark.slow  # compiles a separate training step
def test_a_skipped_last_step_does_not_fail_the_run(tmp_path, monkeypatch):
    without_a_finite_gradient(monkeypatch, after=[1])
    run(small(tmp_path, max_steps=2))
    assert (tmp_path / "model" / "evaluation.json").exists()
    assert saved(tmp_path) == [2]


@pytest.mark.slow  # compiles a separate training step
def test_a_run_whose_weights_diverged_before_its_last_steps_fails(tmp_path):
    # The second step's learning rate overflows the weights; 20 in a row may be skipped.
    config = small(tmp_path / "run", optimizer__learning_rate=1e30, optimizer__epochs=3)
    with pytest.raises(loop.DivergedError, match="The loss on the held-out images is not finite"):
        run(config)
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.slow  # compiles a separate training step
def test_a_run_whose_last_step_diverged_fails(tmp_path):
    # Step 4, the first after the warm-up, has a finite gradient still.
    config = small(tmp_path / "run", optimizer__learning_rate=1e30, optimizer__epochs=3, max_steps=4)
    with pytest.raises(loop.DivergedError, match="The loss on the held-out images is not finite"):
        run(config)
    assert not (tmp_path / "run" / "model").exists()

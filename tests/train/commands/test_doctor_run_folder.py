"""The doctor finds a run folder that cannot be written, or that holds another run."""

import dataclasses
import errno
import json
import os

import pytest

from doctor_runs import failures, findings, of_folder
from train.commands import doctor
from train.config import PretrainedNetwork, TrainConfig
from train.data import open_source
from train.resume.checkpoints import Checkpoints
from train.resume.run_comparison import identify, network_to_dict
from training import first_state, sharded, tiny

pytestmark = pytest.mark.usefixtures("only_requested_steps_are_compiled")


def test_a_folder_that_cannot_be_created_is_a_failure_and_nothing_is_written(folder, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "not mounted")
    for name, changes in (
        ("file", {"run_dir": tmp_path / "file" / "run"}),
        ("file", {"checkpoint_dir": str(tmp_path / "file")}),
        ("link", {"run_dir": tmp_path / "link"}),
    ):
        (found,) = failures(of_folder(folder, tmp_path, **changes))
        assert found.found == f"nothing can be written below {tmp_path / name}, which is not a folder"
        assert "--run-dir (and --checkpoint-dir" in found.remedy
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "file", "link"]


def test_a_folder_that_takes_no_files_is_a_failure(folder, tmp_path, monkeypatch):
    (found,) = failures(of_folder(folder, tmp_path, run_dir=tmp_path / ("a" * 300) / "run"))
    assert found.found == f"nothing can be written to {tmp_path}: File name too long"

    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(doctor.Path, "write_bytes", no_space)
    (found,) = failures(of_folder(folder, tmp_path))
    assert found.subject == "run folder"
    assert found.found == f"nothing can be written to {tmp_path}: No space left on device"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def save_a_state(config):
    run = identify(config, open_source(config.data, "train")) | {"network": network_to_dict(tiny().model)}
    with Checkpoints(config.checkpoints, run) as checkpoints:
        checkpoints.save(first_state(tiny(mesh=sharded(1, 1))))


def test_metrics_without_a_checkpoint_are_a_warning(folder, tmp_path):
    config = of_folder(folder, tmp_path)
    config.run_dir.mkdir()
    (config.run_dir / "metrics.jsonl").write_text('{"kind": "train", "step": 7}\n')
    (found,) = findings(config, "run folder")
    assert found.level == "warning"
    assert "metrics up to step 7" in found.found
    save_a_state(config)
    assert all("has metrics up to" not in finding.found for finding in findings(config))


def test_a_run_that_can_resume_needs_no_pretrained_weights(folder, tmp_path):
    config = of_folder(folder, tmp_path, model=PretrainedNetwork(str(tmp_path / "moved away")))
    (missing,) = failures(config)
    assert "moved away" in missing.found
    save_a_state(config)
    assert not failures(config)


def test_a_folder_with_another_run_is_a_failure(folder, tmp_path):
    config = of_folder(folder, tmp_path)
    save_a_state(dataclasses.replace(config, seed=1))
    (found,) = failures(config)
    assert "seed: 1 -> 42" in found.found
    assert "--run-dir" in found.remedy


def test_a_run_of_another_version_resumes_and_unknown_fields_are_named(folder, tmp_path, monkeypatch, caplog):
    """Its states and recipe.json lack one field, whose value is the default, and have an unknown one."""

    def of_before(config):
        noted = to_dict(config)
        del noted["data"]["augment"]["scaled_decoding"]
        return noted | {"data": noted["data"] | {"restart_markers": 4}}

    config, to_dict = of_folder(folder, tmp_path), TrainConfig.to_dict
    with monkeypatch.context() as patch:
        patch.setattr(TrainConfig, "to_dict", of_before)
        save_a_state(config)
        (tmp_path / "run" / "recipe.json").write_text(json.dumps(config.to_dict()))
    assert not failures(config)
    assert "They are ignored: data.restart_markers: 4" in caplog.text
    other = dataclasses.replace(config.data.augment, scaled_decoding=False)
    (found,) = failures(of_folder(folder, tmp_path, data__augment=other))
    assert "data.augment.scaled_decoding: True -> False" in found.found


def test_a_folder_with_the_recipe_of_another_run_is_a_failure(folder, tmp_path):
    config = of_folder(folder, tmp_path)
    save_a_state(config)
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(dataclasses.replace(config, seed=1).to_dict()))
    (found,) = failures(config)
    assert "seed: 1 -> 42" in found.found


def test_a_folder_of_unreadable_checkpoints_is_a_failure(folder, tmp_path):
    (tmp_path / "run" / "checkpoints" / "7").mkdir(parents=True)
    (found,) = failures(of_folder(folder, tmp_path))
    assert "No checkpoint in" in found.found
    assert "step 7: " in found.found


@pytest.mark.parametrize("content", ["{", "[]", "{}", "\xff", "[" * 100_000, '{"a":' * 900 + "1" + "}" * 900])
def test_a_damaged_recipe_is_named_and_does_not_stop_the_run(folder, tmp_path, caplog, content):
    config = of_folder(folder, tmp_path)
    save_a_state(config)
    path = tmp_path / "run" / "recipe.json"
    path.write_text(content, encoding="latin-1")
    assert not failures(config)
    assert content in ("{}", '{"a":' * 900 + "1" + "}" * 900) or f"Ignores the damaged {path}" in caplog.text

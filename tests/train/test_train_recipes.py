"""A recipe as a file."""

import dataclasses
import json

import pytest

import train
from train import loop
from train.command_line import main
from train.config import TrainConfig
from training import tiny


@pytest.mark.parametrize("name", train.RECIPES)
def test_a_recipe_is_read_as_it_was_written(name):
    config = train.RECIPES[name].config
    written = json.loads(json.dumps(config.to_dict()))
    expected = dataclasses.replace(config, optimizer=config.optimizer.with_defaults())
    assert TrainConfig.from_dict(written) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1.5}, "seed=1.5. Expected int"),
        ({"seed": -1}, "seed=-1: expected a whole number"),
        ({"keep_best": "best"}, "keep_best='best'. Expected .*'top1'"),
        ({"model": {"kind": "Other"}}, "model.kind='Other'. Expected one of: FreshNetwork, PretrainedNetwork"),
        ({"data": {"batch_size": "64"}}, "data.batch_size='64'. Expected int"),
        ({"data": {"image_mean": [0.5, None]}}, "data.image_mean=None. Expected float"),
        ({"optimizer": 3}, "optimizer=3. Expected an object with the fields of OptimizerConfig"),
        ({"optimizer": {"rate": 3}}, "fields that do not exist: optimizer.rate"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_with_the_field(tmp_path, change, message):
    (tmp_path / "recipe.json").write_text(json.dumps(tiny().to_dict() | change))
    with pytest.raises(ValueError, match=f"recipe.json is not a recipe of this version: .*(?s:.*){message}"):
        train.read_recipe_file(tmp_path / "recipe.json")


def test_flags_change_a_recipe_from_a_file(tmp_path, monkeypatch, capsys):
    def run(config, console):
        seen.append(config)
        return loop.Outcome(0, {}, None)

    seen = []
    monkeypatch.setattr(loop, "run", run)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(tiny(tmp_path / "before", keep_best="f1").to_dict()))
    for given in (["--recipe", str(path)], [f"--recipe={path}"]):
        assert main([*given, "--run-dir", str(tmp_path / "new"), "--data.seed", "5"]) == 0
    expected = tiny(tmp_path / "new", keep_best="f1", data__seed=5)
    assert seen == [dataclasses.replace(expected, optimizer=expected.optimizer.with_defaults())] * 2
    assert main(["--recipe", str(tmp_path / "missing.json")]) == 1
    assert "missing.json" in capsys.readouterr().err


def test_another_optimizer_gets_its_defaults_and_says_what_it_keeps_of_the_former(tmp_path, monkeypatch, capsys):
    def optimizer(*arguments):
        assert main([*arguments, "--run-dir", str(tmp_path / "new")]) == 0
        return seen.pop().optimizer.with_defaults(), capsys.readouterr().err

    seen = []
    monkeypatch.setattr(loop, "run", lambda config, console: seen.append(config) or loop.Outcome(0, {}, None))
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(tiny(optimizer__beta1=0.8).to_dict()))
    lamb, message = optimizer("--recipe", str(path), "--optimizer.name", "lamb", "--optimizer.learning-rate", "0.01")
    assert (lamb.epsilon, lamb.clip_norm, lamb.beta1, lamb.learning_rate) == (1e-6, 1.0, 0.8, 0.01)
    assert "which are for adamw, stay with lamb:\n" in message
    assert "--optimizer.beta1 0.8\n" in message + "\n"
    assert "learning-rate" not in message
    path.write_text(json.dumps(tiny(optimizer=lamb).to_dict()))
    adamw, _ = optimizer(f"--recipe={path}", "--optimizer.name=adamw")
    assert (adamw.epsilon, adamw.clip_norm) == (1e-8, None)
    _, message = optimizer("finetune", "--optimizer.name", "sgd")
    assert "--optimizer.learning-rate 0.0005\n" in message
    assert "--optimizer.clip-norm 1.0" in message
    assert "which are for" not in optimizer("finetune", "--optimizer.name", "adamw")[1]

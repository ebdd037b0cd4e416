"""The recipes: the authors' values, changes by flags, and files."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

import train
from poolformer_jax import PoolFormerConfig
from train import loop
from train.command_line import main
from train.compute.optimizer import make_schedule
from train.config import OptimizerConfig, TrainConfig
from train.flags import recipe_from_flags
from train.recipes import RECIPES
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
        *(
            ({"data": {name: 10**9}}, f"{name}=1000000000: expected .*to ")
            for name in ("image_size", "batch_size", "evaluation_batch_size", "workers", "worker_batches")
        ),
        ({"data": {"source": "folder:\0"}}, r"data.source='folder:.x00'. Expected a text without a null"),
        ({"run_dir": "runs/\0"}, "run_dir=.*Expected a text without a null"),
        ({"optimizer": 3}, "optimizer=3. Expected an object with the fields of OptimizerConfig"),
        ({"optimizer": {"rate": 3}}, "fields that do not exist: optimizer.rate"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_with_the_field(tmp_path, change, message):
    (tmp_path / "recipe.json").write_text(json.dumps(tiny().to_dict() | change))
    with pytest.raises(ValueError, match=f"recipe.json is not a recipe of this version: .*(?s:.*){message}"):
        train.read_recipe_file(str(tmp_path / "recipe.json"))


def test_a_recipe_may_keep_values_that_another_one_of_its_values_leaves_unused(tmp_path):
    config = tiny().to_dict()
    config["optimizer"] |= {"name": "sgd", "beta2": 0.95, "epsilon": 1e-6}
    config["data"] |= {"source": "folder:a", "data_dir": "b", "image_column": "c", "label_column": "d"}
    config["distributed"] |= {"mode": "off", "coordinator_address": "a:1", "num_processes": 2, "process_id": 0}
    (tmp_path / "recipe.json").write_text(json.dumps(config))
    assert train.read_recipe_file(tmp_path / "recipe.json").to_dict() == config


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
    for command in ([], ["doctor"], ["show"]):
        assert main([*command, "--recipe", str(tmp_path / "missing.json")]) == 1
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
    with pytest.raises(SystemExit):
        main(["finetune", "--optimizer.name", "adam"])
    assert "which are for" not in capsys.readouterr().err


def test_the_imagenet_recipes_are_the_authors_training():
    # The defaults of sail-sg/poolformer's train.py, the drop-path rates of its README, crops of models/poolformer.py.
    expected = {"s12": (0.1, 0.9), "s24": (0.1, 0.9), "s36": (0.2, 0.9), "m36": (0.3, 0.95), "m48": (0.4, 0.95)}
    for variant, (drop_path_rate, crop_pct) in expected.items():
        config = RECIPES[f"imagenet-{variant}"].config
        optimizer, augment, mix = config.optimizer.with_defaults(), config.data.augment, config.data.mix
        assert optimizer.name == "adamw"
        assert (config.model.drop_path_rate, config.data.crop_pct) == (drop_path_rate, crop_pct)
        assert config.dtype == "bfloat16"  # README: --apex-amp, which computes in float16
        assert (optimizer.epochs, optimizer.warmup_epochs, optimizer.cooldown_epochs) == (300, 5, 10)
        assert (optimizer.learning_rate, optimizer.learning_rate_batch, config.data.batch_size) == (1e-3, 1024, 1024)
        assert (optimizer.weight_decay, optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (0.05, 0.9, 0.999, 1e-8)
        assert (optimizer.warmup_learning_rate, optimizer.final_learning_rate) == (1e-6, 1e-5)
        assert (optimizer.schedule_every, optimizer.clip_norm, optimizer.ema_decay) == ("epoch", None, None)
        assert (augment.crop_scale, augment.interpolation) == ((0.08, 1.0), "random")
        assert (augment.horizontal_flip, augment.randaugment) == (0.5, "rand-m9-mstd0.5-inc1")
        assert (mix.mixup, mix.cutmix, mix.switch_to_cutmix, mix.mix_probability) == (0.8, 1.0, 0.5, 1.0)
        assert (mix.label_smoothing, mix.erase_probability, mix.mix_group) == (0.1, 0.25, 128)


# sail-sg/metaformer, scripts/: optimizer, learning rate, warm-up, and by size the drop path and the head's dropout.
SECOND_PAPER = {
    "identityformer": ("adamw", 4e-3, 5, {"s12": 0.1, "s24": 0.1, "s36": 0.2, "m36": 0.3, "m48": 0.4}, {}),
    "randformer": ("adamw", 4e-3, 5, {"s12": 0.1, "s24": 0.1, "s36": 0.2, "m36": 0.3, "m48": 0.3}, {}),
    "poolformerv2": ("adamw", 4e-3, 5, {"s12": 0.1, "s24": 0.1, "s36": 0.2, "m36": 0.3, "m48": 0.4}, {}),
    "convformer": ("adamw", 4e-3, 20, {"s18": 0.2, "s36": 0.3, "m36": 0.4, "b36": 0.6}, {}),
    "caformer": (
        *("lamb", 8e-3, 20, {"s18": 0.15, "s36": 0.3, "m36": 0.4, "b36": 0.6}),
        {"s36": 0.4, "m36": 0.4, "b36": 0.5},
    ),
}


def test_the_recipes_of_the_second_paper_are_the_authors_training():
    for kind, (name, rate, warmup, drop_paths, dropouts) in SECOND_PAPER.items():
        for size, drop_path in drop_paths.items():
            config = RECIPES[f"imagenet-{kind}_{size}"].config
            optimizer, data = config.optimizer.with_defaults(), config.data
            own = {"drop_path_rate": drop_path, "head_dropout_rate": dropouts.get(size, 0.0), "num_labels": 0}
            assert PoolFormerConfig.from_variant(f"{kind}_{size}", **own).to_dict() == config.model.to_dict()
            assert (optimizer.name, optimizer.learning_rate, optimizer.warmup_epochs) == (name, rate, warmup)
            assert (optimizer.epochs, optimizer.cooldown_epochs, optimizer.schedule) == (300, 10, "cosine")
            assert (optimizer.weight_decay, optimizer.epsilon) == (0.05, 1e-6 if name == "lamb" else 1e-8)
            assert (optimizer.clip_norm, optimizer.ema_decay) == (1.0 if name == "lamb" else None, None)
            assert (data.batch_size, optimizer.learning_rate_batch) == (4096, 4096)
            assert (data.crop_pct, data.image_size, config.dtype) == (1.0, 224, "bfloat16")
            assert data.mix == RECIPES["imagenet-s12"].config.data.mix
            assert data.augment == RECIPES["imagenet-s12"].config.data.augment


def test_the_fine_tuning_at_384_pixels_is_that_of_the_authors():
    rates = {"convformer": ("adamw", 5e-5), "caformer": ("lamb", 1e-4)}
    drop_paths = {"convformer": (0.3, 0.5, 0.8, 0.8), "caformer": (0.3, 0.5, 0.7, 0.8)}
    dropouts = {"convformer": (0.4, 0.4, 0.5, 0.5), "caformer": (0.4, 0.4, 0.4, 0.5)}
    for kind, (name, rate) in rates.items():
        for size, drop_path, dropout in zip(("s18", "s36", "m36", "b36"), drop_paths[kind], dropouts[kind]):
            config = RECIPES[f"imagenet-{kind}_{size}_384"].config
            optimizer, data, model = config.optimizer, config.data, config.model
            assert (model.source, model.keep_head) == (f"runs/imagenet-{kind}_{size}/model", True)
            assert (model.drop_path_rate, model.head_dropout_rate) == (drop_path, dropout)
            assert (optimizer.name, optimizer.learning_rate, optimizer.learning_rate_batch) == (name, rate, 1024)
            assert (optimizer.total_epochs, optimizer.ema_decay, optimizer.weight_decay) == (30, 0.9999, 0.05)
            schedule = make_schedule(optimizer, 10, data.batch_size)
            assert [float(schedule(step)) for step in (0, 17, 299)] == [pytest.approx(rate)] * 3
            assert (data.image_size, data.crop_pct, data.batch_size) == (384, 1.0, 1024)
            assert (data.mix.mixes, data.mix.label_smoothing, data.mix.erase_probability) == (False, 0.1, 0.25)


def test_a_recipe_says_what_to_expect():
    for name, recipe in RECIPES.items():
        assert f"python -m train {name}".removesuffix(" digits") in recipe.details
        if name.startswith("imagenet"):
            assert re.search(r"\d\d\.\d % top-1", recipe.details)
            assert re.search(r"\d+ hours on a TPU v4-32", recipe.details)


@pytest.mark.parametrize("flags", [["--optimizer.epochs", "1"], ["--optimizer.epochs=1"]])
def test_fewer_epochs_than_the_recipes_warmup_shorten_it_with_a_sentence(flags, capsys):
    config = recipe_from_flags("finetune", ["--data.source", "digits", *flags], "program")
    assert (config.optimizer.epochs, config.optimizer.warmup_epochs) == (1, 0)
    assert "shortened from 1 to 0 epochs, to fit --optimizer.epochs 1" in capsys.readouterr().err


def test_a_given_warmup_is_not_shortened(capsys):
    with pytest.raises(SystemExit):
        recipe_from_flags("finetune", ["--optimizer.epochs", "1", "--optimizer.warmup-epochs", "1"], "program")
    assert "--optimizer.warmup-epochs" in capsys.readouterr().err


def test_configuration_mistakes_are_named_together():
    with pytest.raises(ValueError, match=r"(?s)log_every=0: expected.*max_skipped=0: expected"):
        dataclasses.replace(tiny(), log_every=0, max_skipped=0)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        *((OptimizerConfig, name) for name in ("learning_rate_batch", "clip_norm", "layer_decay")),
        *((tiny, name) for name in ("save_every", "keep_every", "max_steps", "data__evaluation_batch_size")),
    ],
)
def test_zero_is_not_none_where_a_field_may_be_left_out(make, field):
    make(**{field: None})
    with pytest.raises(ValueError, match=rf"{field.removeprefix('data__')}=0: expected None, or "):
        make(**{field: 0})


def test_a_run_folder_may_be_a_string_in_python():
    assert tiny(run_dir="runs/one").run_dir == Path("runs/one")


def test_a_learning_rate_below_the_final_one_is_an_error_that_names_the_flag():
    with pytest.raises(ValueError, match=r"above the peak.*--optimizer.final-learning-rate of at most 5e-06"):
        make_schedule(OptimizerConfig(learning_rate=5e-6, learning_rate_batch=None), 8, 10)
    with pytest.raises(ValueError, match="learning_rate=inf: expected a positive, finite number"):
        OptimizerConfig(learning_rate=float("inf"))

"""`python -m convert`: the files, the output and the exit status."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import archives
from conversions import FIXTURES, SAIL, report_of, run
from convert.command_line import main
from golden import published
from golden.fixture_values import parameter
from paths import ROOT
from poolformer_jax import PoolFormerConfig
from poolformer_jax.network import VARIANTS
from poolformer_jax.weights import leaves, load_pretrained, open_model, open_weights
from saved_models import CONFIG, save


@pytest.mark.parametrize(
    ("file", "layout"),
    [
        ("hf_sharded", "jax"),
        ("sail_checkpoint_legacy.pth.tar", "hf"),
        ("timm_checkpoint.pth.tar", "sail"),
        *(
            pytest.param(file, layout, marks=pytest.mark.slow)
            for file, layout in (
                *(("hf_sharded", layout) for layout in ("hf", "sail")),
                *(("sail_checkpoint_legacy.pth.tar", layout) for layout in ("jax", "sail")),
                *(("timm_checkpoint.pth.tar", layout) for layout in ("jax", "hf")),
            )
        ),
    ],
)
def test_every_source_converts_to_every_layout_with_the_same_weights(tmp_path, capsys, file, layout):
    assert run(FIXTURES / file, tmp_path / "model", "--to", layout, "--verify") == 0
    model, variables = load_pretrained(tmp_path / "model")
    original_model, original = load_pretrained(FIXTURES / file)
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, original))
    assert model.config.id2label == original_model.config.id2label
    report = report_of(tmp_path / "model")
    assert report["verification"]["passed"] and report["verification"]["arrays"] == 62
    assert not report["missing"] + report["unexpected"] + report["misshaped"]
    said = capsys.readouterr()
    assert "62 of 62 arrays are the source's, bit for bit" in said.out
    # timm's head order differs from that of hf and sail.
    assert ("its logits will differ" in said.err) == (file.startswith("timm") and layout != "jax")


def test_the_report_describes_source_destination_and_arrays(tmp_path):
    file = FIXTURES / "sail_checkpoint_legacy.pth.tar"
    assert run(file, tmp_path / "model") == 0
    report = report_of(tmp_path / "model")
    source = report["source"]
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert source["files"] == [{"path": str(file), "bytes": file.stat().st_size, "sha256": sha256}]
    assert (source["container"], source["wrapping"], source["has_ema"]) == ("torch legacy", "state_dict", True)
    assert (source["layout"], source["variant"], source["head_order"]) == ("sail", None, "norm_pool")
    assert (source["dtypes"], source["parameters"], source["num_labels"]) == ({"float32": 62}, 2611, 3)
    assert report["destination"]["layout"] == "jax"
    by_name = {array["source"]: array for array in report["arrays"]}
    assert by_name.keys() == open_weights(file).tensors.keys()
    assert by_name["network.1.proj.weight"] == {
        "source": "network.1.proj.weight",
        "destination": "stages_1/downsample/conv/kernel",
        "parameter": "stages_1/downsample/conv/kernel",
        "source_shape": [4, 2, 3, 3],
        "destination_shape": [3, 3, 2, 4],
        "transform": "OIHW -> HWIO",
        "dtype": "float32",
        "rounded": False,
    }
    transforms = {array["transform"] for array in report["arrays"]}
    assert transforms == {"OIHW -> HWIO", "OI11 -> IO", "OI -> IO", "as it is"}


def test_all_paths_may_begin_with_a_tilde(tmp_path, monkeypatch, capsys):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    shutil.copy(FIXTURES / "hf.bin", home)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    assert run("~/hf.bin", "~/model") == 0
    assert report_of(home / "model")["destination"]["folder"] == str(home / "model")
    assert f"Report   {home / 'model' / 'report.json'}" in capsys.readouterr().out
    assert run("~/hf.bin", "~/other", "--report", "~/my-report.json") == 0
    assert json.loads((home / "my-report.json").read_text())["destination"]["folder"] == str(home / "other")
    assert run("~/hf.bin", "~/other", "--report", "~/hf.bin") == 1
    assert "is a file of the source" in capsys.readouterr().err
    assert run("~/model", "~/model") == 1
    assert "is the source's own folder" in capsys.readouterr().err
    assert run("inspect", "~/model") == 0
    assert not list(elsewhere.iterdir())


def test_it_runs_as_a_program_and_prints_within_eighty_columns(tmp_path):
    command = [sys.executable, "-m", "convert", FIXTURES / "hf.bin", tmp_path / "model"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    table = done.stdout.split("\nModel ")[0].splitlines()
    assert max(map(len, table)) <= 80
    assert any("poolformer.encoder.patch_embeddings.*.projection.weight  OIHW -> HWIO" in line for line in table)


def test_ema_converts_the_moving_average(tmp_path):
    assert run(FIXTURES / "timm_checkpoint.pth.tar", tmp_path / "model", "--ema") == 0
    _, variables = load_pretrained(tmp_path / "model")
    np.testing.assert_array_equal(variables["params"]["norm"]["bias"], parameter("ema.head.norm.bias", (8,)))


def test_offline_a_possible_preprocessing_file_on_the_hub_is_an_error(tmp_path, capsys):
    repository = tmp_path / "cache" / "models--someone--tiny"
    shutil.copytree(FIXTURES / "hf_sharded", repository / "snapshots" / "c0ffee")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee")
    assert run("someone/tiny", tmp_path / "model", "--cache-dir", tmp_path / "cache", "--local-files-only") == 1
    assert "The Hub's cache of someone/tiny has no preprocessor_config.json." in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
    assert run("inspect", "someone/tiny", "--cache-dir", tmp_path / "cache", "--local-files-only") == 1
    assert "sharded safetensors" in capsys.readouterr().out


def test_variant_names_a_network_that_the_arrays_do_not_determine(tmp_path):
    """Pooling and identity have no arrays, so those of s12 and of metaformer_id_s12 are alike."""
    save(tmp_path / "theirs", "sail", PoolFormerConfig.from_variant("s12", num_labels=3))
    source = tmp_path / "theirs" / "model.pth.tar"
    assert run(source, tmp_path / "named", "--variant", "metaformer_id_s12") == 0
    model, _ = load_pretrained(tmp_path / "named")
    assert model.config.token_mixers == ("identity",) * 4
    assert run(FIXTURES / "hf.bin", tmp_path / "model", "--variant", "metaformer_id_s12") == 1
    assert not (tmp_path / "model").exists()


def test_the_report_says_that_float64_is_rounded(tmp_path):
    assert run(FIXTURES / "timm_float64.pth", tmp_path / "model", "--verify") == 0
    assert all(array["rounded"] for array in report_of(tmp_path / "model")["arrays"])


def test_output_into_a_file_has_no_colours_and_no_progress_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run(FIXTURES / "hf.bin", tmp_path / "model", "--verify") == 0
    assert "\x1b" not in "".join(capsys.readouterr())


def test_only_published_networks_convert_to_timm(tmp_path, capsys):
    assert run(FIXTURES / "hf.bin", tmp_path / "model", "--to", "timm") == 1
    assert "timm.create_model has no network of depths (1, 1, 2, 1)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("channels", "note", "layout"),
    [
        (1, "there is no default for 1 channels", "jax"),
        (4, "there is no default for 4 channels", "hf"),
        (3, "there is no default", "jax"),
    ],
)
def test_networks_with_unknown_preprocessing_are_converted(tmp_path, capsys, channels, note, layout):
    save(tmp_path / "theirs", "sail", dataclasses.replace(CONFIG, num_channels=channels))
    assert run(tmp_path / "theirs", tmp_path / "model", "--to", layout, "--verify") == 0
    assert f"not saved; {note}" in capsys.readouterr().out
    assert not (tmp_path / "model" / "preprocessor_config.json").exists()
    assert load_pretrained(tmp_path / "model")[0].config.num_channels == channels


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        *(([], 2), (["a"], 2), (["a", "b", "--to", "keras"], 2), (["inspect"], 2), (["--help"], 0), (["--version"], 0)),
        *((["--ema", "inspect", "b"], 2), (["a", ""], 2), (["", "b"], 2), (["a", "b", "--report", ""], 2)),
    ],
)
def test_exit_status_of_wrong_usage_and_help(capsys, arguments, code):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == code
    if code == 0:
        shown = "poolformer-jax 0" if "--version" in arguments else "poolformer_m48.pth.tar models/m48 --verify"
        assert shown in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "code", "texts"),
    [
        (
            "timm_checkpoint.pth.tar",
            0,
            ["torch zip, under the key 'state_dict'", "yes, with --ema", "timm", "pool, then"],
        ),
        ("hf_sharded", 0, ["sharded safetensors", "hf", "2,611", "3, named", "depths 1-1-2-1, widths 2-4-6-8"]),
        ("timm_bfloat16_legacy.pth", 0, ["torch legacy", "62 bfloat16"]),
        ("views.pth", 1, ["torch zip", "8 float32, 1 int64"]),
    ],
)
def test_inspect_describes_a_file(capsys, file, code, texts):
    assert run("inspect", FIXTURES / file) == code
    said = capsys.readouterr()
    assert all(text in said.out for text in texts), said.out
    assert said.err.startswith("error: ") == bool(code)


@pytest.mark.parametrize("kind", ["poolformerv2", "identityformer", "randformer", "convformer", "caformer"])
def test_the_second_papers_weights_convert_from_both_layouts_and_back(tmp_path, capsys, kind):
    """Through folders of this package; networks of this size are not published, so there is no folder for timm."""
    original = published.state_dict("family/sail", f"{kind}_tiny")
    name = next(variant for variant in VARIANTS if variant.startswith(kind))
    source = archives.checkpoint(tmp_path / f"{name}.pth", {"state_dict": original})
    assert run(source, tmp_path / "ours", "--verify") == 0
    said = capsys.readouterr()
    assert f"{len(original)} of {len(original)} arrays are the source's, bit for bit" in said.out and not said.err
    assert run(tmp_path / "ours", tmp_path / "theirs", "--to", "sail") == 0
    back = open_weights(tmp_path / "theirs" / "model.pth.tar").tensors
    assert list(back) == list(original)
    for name, array in original.items():
        np.testing.assert_array_equal(np.asarray(back[name]), array, strict=True)
    assert run(tmp_path / "ours", tmp_path / "hf", "--to", "hf") == 1
    assert "has no name for stem/norm/scale" in capsys.readouterr().err


def test_the_authors_second_layout_converts_to_timms_with_its_dimensions(tmp_path, capsys):
    config = PoolFormerConfig.from_variant("caformer_s18", num_labels=2)
    arrays = {leaf.name: np.zeros(leaf.stored_shape, np.float16) for leaf in leaves(config, "sail")}
    source = archives.checkpoint(tmp_path / "caformer_s18_384.pth", arrays)
    assert run(source, tmp_path / "timm", "--to", "timm") == 0
    assert "head_norm_epsilon=1e-05, and the model of timm computes 1e-06" in " ".join(capsys.readouterr().err.split())
    report = report_of(tmp_path / "timm")
    transform = {array["source"]: array["transform"] for array in report["arrays"]}
    assert transform["stages.0.0.mlp.fc1.weight"] == "OI -> OI11"
    assert transform["stages.2.0.mlp.fc1.weight"] == transform["head.fc2.weight"] == "as it is"
    assert report["destination"]["head_norm_epsilon"] == 1e-6
    written = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert (written["architecture"], written["pretrained_cfg"]["input_size"]) == ("caformer_s18", [3, 384, 384])
    assert open_model(tmp_path / "timm").image_processor.crop_size["height"] == 384


def test_our_layout_converts_to_hf_bit_for_bit(tmp_path):
    assert run(FIXTURES / "hf_sharded", tmp_path / "ours") == 0
    assert run(tmp_path / "ours", tmp_path / "theirs", "--to", "hf") == 0
    transform = {array["source"]: array["transform"] for array in report_of(tmp_path / "theirs")["arrays"]}
    assert transform["stages_1/downsample/conv/kernel"] == "HWIO -> OIHW"
    written = {
        name: np.asarray(tensor) for name, tensor in open_weights(tmp_path / "theirs/model.safetensors").tensors.items()
    }
    for name, array in written.items():
        np.testing.assert_array_equal(array, parameter(name, array.shape), strict=True)
    shutil.rmtree(tmp_path / "ours")
    assert load_pretrained(tmp_path / "theirs")[0].config.id2label == {0: "cat", 1: "dog", 2: "axolotl"}


def test_names_to_leave_out_are_patterns(tmp_path, capsys):
    arrays = {name: np.asarray(tensor) for name, tensor in open_weights(SAIL).tensors.items()}
    path = archives.checkpoint(tmp_path / "poolformer_s12.pth", {**arrays, "metric.total": arrays["head.bias"]})
    assert run(path, tmp_path / "model") == 1
    assert "--ignore 'metric.*'" in capsys.readouterr().err
    assert run(path, tmp_path / "model", "--ignore", "metric.*", "--ignore", "other") == 0


def test_a_file_name_is_printed_as_it_is_without_control_characters(tmp_path, capsys):
    folder = tmp_path / "[red]\x1b[2J["
    folder.mkdir()
    source = shutil.copy(FIXTURES / "hf.bin", folder / "b].bin")
    assert run("inspect", source) == 0
    assert capsys.readouterr().out.splitlines()[0] == rf"{tmp_path}/[red]\x1b[2J[/b].bin"

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
import safetensors.numpy

import archives
from convert.command_line import main
from convert.conversion import convert
from convert.verification import relative_difference, verify
from golden import published
from golden.fixture_values import parameter
from paths import ROOT, TESTS
from poolformer_jax import PoolFormerConfig
from poolformer_jax.network import VARIANTS
from poolformer_jax.weights import leaves, load_pretrained, open_model, open_weights
from saved_models import CONFIG, save

FIXTURES = TESTS / "fixtures"
SAIL = FIXTURES / "sail_checkpoint_legacy.pth.tar"


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def run(*arguments):
    return main([str(argument) for argument in arguments])


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


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


def test_mismatched_names_are_reported_and_no_folder_is_written(tmp_path, capsys):
    arrays = {name: np.asarray(tensor) for name, tensor in open_weights(FIXTURES / "hf.bin").tensors.items()}
    arrays["norm.wieght"] = arrays.pop("norm.weight")
    safetensors.numpy.save_file(arrays, tmp_path / "wrong.safetensors")
    report = tmp_path / "reports" / "wrong.json"
    assert run(tmp_path / "wrong.safetensors", tmp_path / "model", "--report", report) == 1
    assert "missing: norm.weight [8]; the nearest name on the other side is norm.wieght" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
    written = json.loads(report.read_text())
    assert (written["missing"], written["unexpected"]) == (
        [{"name": "norm.weight", "shape": [8]}],
        [{"name": "norm.wieght", "shape": [8]}],
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("whole_model.bin", "Nothing was run"),
        ("hf_backbone.bin", "backbone without final norm and head"),
        ("nothing.pth", "There is no model at"),
    ],
)
def test_a_failed_conversion_prints_one_message_and_writes_no_folder(tmp_path, capsys, source, message):
    assert run(FIXTURES / source, tmp_path / "model") == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("destination", "message"),
    [
        ("/proc/nowhere", "Cannot write /proc/nowhere: No such file or directory"),
        ("{folder}/file/model", "Cannot write {folder}/file/model: File exists"),
        ("{folder}/file/deeper/model", "Cannot write {folder}/file/deeper/model: Not a directory"),
        ("{folder}/model.onnx", "{folder}/model.onnx looks like the name of a file. Expected that of a folder"),
    ],
)
def test_a_destination_that_cannot_be_written_is_named(tmp_path, capsys, destination, message):
    (tmp_path / "file").write_text("not a folder")
    assert run(FIXTURES / "hf.bin", destination.format(folder=tmp_path)) == 1
    assert capsys.readouterr().err.startswith(f"error: {message.format(folder=tmp_path)}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("layout", ["jax", "sail"])
def test_a_full_disk_is_reported_with_the_folder_and_leaves_nothing(tmp_path, layout):
    # Files are limited to two kilobytes, enough for the preprocessing and too little for the weights.
    model = tmp_path / "model"
    command = f"ulimit -f 2; exec {sys.executable} -B -m convert {FIXTURES / 'hf.bin'} {model} --to {layout}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: Cannot write {model}: File too large")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json", "model-00001-of-00002.safetensors"])
def test_a_report_does_not_overwrite_the_source(tmp_path, capsys, name):
    source = tmp_path / "source"
    shutil.copytree(FIXTURES / "hf_sharded", source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    assert name in before
    assert run(source, tmp_path / "model", "--report", source / "." / name) == 1
    assert "is a file of the source. Expected another name" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in source.iterdir()} and not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "name", [*(f"model/{name}" for name in ("flax_model.safetensors", "config.json", "README.md")), "model"]
)
def test_a_report_does_not_overwrite_the_model(tmp_path, capsys, name):
    assert run(FIXTURES / "hf.bin", tmp_path / "model", "--report", tmp_path / name) == 1
    assert "would overwrite the model. Expected another name" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_a_model_is_replaced_only_on_request(tmp_path, capsys):
    arguments = (FIXTURES / "hf.bin", tmp_path / "model")
    assert run(SAIL, tmp_path / "model") == 0
    before = (tmp_path / "model" / "flax_model.safetensors").read_bytes()
    assert run(*arguments) == 1
    assert "model already has a model (flax_model.safetensors). Expected a new folder, or --overwrite" in (
        capsys.readouterr().err
    )
    assert (tmp_path / "model" / "flax_model.safetensors").read_bytes() == before
    assert run(*arguments, "--overwrite") == 0
    assert (tmp_path / "model" / "flax_model.safetensors").read_bytes() != before
    assert run(tmp_path / "model", tmp_path / "model", "--overwrite") == 1
    assert "is the source's own folder" in capsys.readouterr().err


def test_output_into_a_file_has_no_colours_and_no_progress_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run(FIXTURES / "hf.bin", tmp_path / "model", "--verify") == 0
    assert "\x1b" not in "".join(capsys.readouterr())


def test_only_published_networks_convert_to_timm(tmp_path, capsys):
    assert run(FIXTURES / "hf.bin", tmp_path / "model", "--to", "timm") == 1
    assert "timm.create_model has no network of depths (1, 1, 2, 1)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("channels", "note"),
    [(1, "there is no default for 1 channels"), (4, "there is no default for 4 channels"), (3, "there is no default")],
)
@pytest.mark.parametrize("layout", ["jax", "hf"])
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


def test_verification_finds_one_changed_bit(tmp_path):
    source = open_model(FIXTURES / "hf.bin")
    mapped = convert(source, tmp_path / "model", "jax", lambda size: None)
    assert verify(source, tmp_path / "model", mapped).passed
    path = tmp_path / "model" / "flax_model.safetensors"
    content = bytearray(path.read_bytes())
    content[content.index(parameter("norm.weight", (8,)).tobytes())] ^= 1
    path.write_bytes(content)
    result = verify(source, tmp_path / "model", mapped)
    assert (result.different, result.passed) == (("norm.weight",), False)


def test_outputs_that_are_all_zeros_are_compared():
    zeros = np.zeros((2, 3), np.float32)
    assert relative_difference(zeros, zeros) == 0
    assert np.isnan(relative_difference(zeros, zeros + np.nan)) and np.isnan(relative_difference(zeros + np.nan, zeros))


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


def test_verification_says_what_no_array_shows(tmp_path, capsys):
    arrays = {name: np.asarray(tensor) for name, tensor in open_weights(SAIL).tensors.items()}
    path = archives.checkpoint(tmp_path / "best.pth", arrays)
    assert run(path, tmp_path / "model", "--verify") == 0
    said = capsys.readouterr()
    assert "Not verified: norm='group_norm' and token_mixers=" in said.out and "--variant s12" in said.err
    assert report_of(tmp_path / "model")["verification"]["not_verified"].startswith("norm='group_norm'")
    named = archives.checkpoint(tmp_path / "poolformer_ln_s12.pth.tar", arrays)
    assert run(named, tmp_path / "named", "--verify") == 0
    assert "Not verified" not in capsys.readouterr().out
    assert load_pretrained(tmp_path / "named")[0].config.norm == "layer_norm"


@pytest.mark.slow
def test_verification_measures_what_another_order_of_the_head_changes(tmp_path, capsys):
    assert run(FIXTURES / "timm_checkpoint.pth.tar", tmp_path / "model", "--to", "sail", "--verify") == 0
    difference = report_of(tmp_path / "model")["verification"]["head_order_difference"]
    model, variables = load_pretrained(tmp_path / "model")
    pixel_values = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    original, _ = load_pretrained(FIXTURES / "timm_checkpoint.pth.tar")
    ours, theirs = (np.asarray(one.apply(variables, pixel_values).logits) for one in (model, original))
    assert difference == pytest.approx(np.abs(ours - theirs).max() / np.abs(theirs).max(), rel=1e-3)
    assert f"{difference:.1e} of the largest value" in " ".join(capsys.readouterr().out.split())


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

"""What can be exported, what an exported file says about itself, and that a failure leaves no file."""

import dataclasses
import errno
import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exports import CONFIGS, NEEDS_OPENVINO, ONE_BLOCK, SMALL, needs
from poolformer_jax import ExportError, InputError, PoolFormerConfig, PoolFormerImageProcessor, export_model
from poolformer_jax.cli import main
from poolformer_jax.export.exported_file import open_exported, verify_file
from poolformer_jax.export.metadata import metadata
from poolformer_jax.inference import load_onnxruntime, load_openvino
from poolformer_jax.inference.folding import fold
from poolformer_jax.weights import save_pretrained
from small_networks import FAMILY, LABELS, PROCESSOR, TWO_STAGES, random_variables


def test_onnx_fixes_the_image_size_if_asked_to_or_if_the_network_does(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")

    def input_shape(name, **options):
        variables = random_variables(CONFIGS[name])[1]
        path = tmp_path / "network.onnx"
        export_model(path, CONFIGS[name], variables, PROCESSOR, LABELS, **options)
        return onnxruntime.InferenceSession(path).get_inputs()[0].shape

    assert input_shape("published") == ["batch", "height", "width", 3]
    assert input_shape("published", image_size=(64, 96)) == ["batch", 64, 96, 3]
    assert all(isinstance(side, int) for side in input_shape("ablation")[1:])


def test_bfloat16_is_exported_to_stablehlo_but_not_to_onnx(tmp_path):
    config = TWO_STAGES
    _, variables = random_variables(config)
    options = {"dtype": jnp.bfloat16}
    assert 1e-5 < export_model(tmp_path / "n.stablehlo", config, variables, PROCESSOR, **options) < 5e-2
    with pytest.raises(ValueError, match=r"dtype='junk' cannot be exported to ONNX\. Expected float32 or float16"):
        export_model(tmp_path / "n.onnx", config, variables, PROCESSOR, LABELS, dtype="junk")
    with pytest.raises(ValueError, match="bfloat16 cannot be exported to ONNX"):
        export_model(tmp_path / "N.ONNX", config, variables, PROCESSOR, LABELS, **options)


@pytest.mark.parametrize(
    "ending", [pytest.param(".stablehlo", marks=pytest.mark.slow), ".onnx", pytest.param(".xml", marks=NEEDS_OPENVINO)]
)
def test_a_file_takes_8_bit_pixels_and_gives_probabilities_on_request(ending, tmp_path):
    pytest.importorskip("onnxruntime")
    config = TWO_STAGES
    model, variables = random_variables(config)
    path = tmp_path / f"n{ending}"
    assert 0 < export_model(path, config, variables, PROCESSOR, uint8=True, probabilities=True) < 1e-5
    pixels = np.random.default_rng(3).integers(0, 256, (2, 64, 64, 3), np.uint8)
    if ending == ".stablehlo":
        _, probabilities = jax.export.deserialize(bytearray(path.read_bytes())).call(pixels)
    else:
        probabilities = (load_openvino if ending == ".xml" else load_onnxruntime)(path)(pixels, "probabilities")
    expected = jax.nn.softmax(jax.jit(model.apply)(variables, PROCESSOR.normalize(pixels)).logits)
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-5)
    assert open_exported(path).facts["input"].startswith("pixel_values: uint8 [batch, ")
    with pytest.raises(InputError, match="no probabilities"):
        export_model(path, dataclasses.replace(config, num_labels=1), {}, PROCESSOR, probabilities=True)


@pytest.mark.parametrize("ending", [".onnx", pytest.param(".xml", marks=NEEDS_OPENVINO)])
def test_float16_halves_the_file_and_keeps_the_logits(ending, tmp_path):
    pytest.importorskip("onnxruntime")
    config = FAMILY["identityformer"]
    variables = random_variables(config)[1]
    sizes = []
    for dtype in ("float32", "float16"):
        difference = export_model(tmp_path / f"{dtype}{ending}", config, variables, PROCESSOR, LABELS, dtype=dtype)
        assert 0 < difference < (1e-5 if dtype == "float32" else 2e-3)
        sizes.append(max(file.stat().st_size for file in tmp_path.glob(f"{dtype}.*")))
    assert sizes[1] < 0.6 * sizes[0]


def test_int8_takes_at_most_two_fifths_of_the_size_and_says_so(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    config = FAMILY["identityformer"].with_changes(hidden_sizes=(64, 64, 128, 128))
    model, variables = random_variables(config)
    save_pretrained(tmp_path / "model", model, variables, image_processor=PROCESSOR)
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "model" / "n.onnx"), "--dtype", "int8"]) == 0
    share = (tmp_path / "model" / "n.onnx").stat().st_size / sum(4 * leaf.size for leaf in jax.tree.leaves(variables))
    assert share < 0.4
    assert f"{100 * share:.0f} % of the parameters' size in float32" in capsys.readouterr().out
    assert open_exported(tmp_path / "model" / "n.onnx").facts["dtype"] == "int8"
    assert main(["verify", str(tmp_path / "model")]) == 0


@pytest.mark.slow
@NEEDS_OPENVINO
def test_verify_compares_every_exported_file_of_a_folder_with_its_network(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    model, variables = random_variables(TWO_STAGES)
    save_pretrained(tmp_path, model, variables, image_processor=PROCESSOR)
    other = jax.tree.map(lambda leaf: leaf * 1.01, variables)
    for name, exported in {"a.onnx": variables, "b.xml": variables, "c.stablehlo": variables, "d.onnx": other}.items():
        export_model(tmp_path / name, TWO_STAGES, exported, PROCESSOR, uint8=name == "b.xml")
    assert main(["verify", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    names = ("a.onnx", "b.xml", "c.stablehlo", "d.onnx")
    assert [line.partition(":")[0] for line in lines] == [str(tmp_path / name) for name in names]
    assert all("logits differ" in line for line in lines[:3]) and "computes other logits" in lines[3]
    (tmp_path / "d.onnx").unlink()
    assert main(["verify", str(tmp_path)]) == 0


def test_verify_prints_the_whole_name_of_a_file(tmp_path, capsys):
    folder = tmp_path / ("long" * 40)
    save_pretrained(folder, *random_variables(ONE_BLOCK), image_processor=PROCESSOR)
    (folder / "damaged.stablehlo").touch()
    assert main(["verify", str(folder)]) == 1
    assert capsys.readouterr().out.startswith(f"{folder / 'damaged.stablehlo'}: ")


def test_no_file_is_written_if_the_converted_logits_differ(tmp_path, monkeypatch):
    config = TWO_STAGES
    _, variables = random_variables(config)
    wrong = lambda config, variables: jax.tree.map(lambda leaf: leaf * 1.1, fold(config, variables))  # noqa: E731
    monkeypatch.setattr("poolformer_jax.export.model_file.fold", wrong)
    for name in ("n.stablehlo", "n.onnx"):
        with pytest.raises(ExportError, match="computes other logits"):
            export_model(tmp_path / name, config, variables, PROCESSOR)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [0, np.nan])
def test_a_head_of_zeros_is_exported_and_a_head_of_nan_is_refused(value, tmp_path):
    config = TWO_STAGES
    params = random_variables(config)[1]["params"]
    variables = {"params": {**params, "head": jax.tree.map(lambda leaf: jnp.full_like(leaf, value), params["head"])}}
    export = partial(export_model, tmp_path / "n.stablehlo", config, variables, PROCESSOR)
    if value == 0:
        assert export() == 0
    else:
        with pytest.raises(ValueError, match=r"no numbers\. Expected finite weights"):
            export()
        assert not list(tmp_path.iterdir())


def test_an_image_size_that_the_network_does_not_take_is_refused(tmp_path):
    config = CONFIGS["ablation"]  # made for 64 x 64 pixels
    _, variables = random_variables(config)
    for ending in (".stablehlo", ".onnx"):
        with pytest.raises(ValueError, match=r"parameters for every position of images of 64 by 64"):
            export_model(tmp_path / f"n{ending}", config, variables, PROCESSOR, LABELS, image_size=(96, 96))
    assert not list(tmp_path.iterdir())


def test_metadata_describes_the_input_and_the_output():
    facts = metadata(CONFIGS["published"], PROCESSOR, LABELS, (96, 96))
    assert "[batch, 96, 96, 3]" in facts["input"] and facts["input"].endswith("RGB")
    assert PoolFormerImageProcessor.from_dict(json.loads(facts["preprocessor_config"])).output_size == (96, 96)
    wide = PoolFormerImageProcessor.from_dict(
        json.loads(metadata(CONFIGS["published"], PROCESSOR, LABELS, (33, 70))["preprocessor_config"])
    )
    assert wide(np.zeros((50, 50), np.uint8))["pixel_values"].shape == (1, 33, 70, 3)
    headless = PoolFormerConfig(**{**SMALL, "num_labels": 0, "num_channels": 1})
    facts = metadata(headless, PoolFormerImageProcessor(image_mean=(0.5,), image_std=(0.5,)), {}, (224, 224))
    assert facts["input"].endswith("greyscale")
    assert facts["output"] == "logits: float32 [batch, 64]; pooled and normalised, there is no head"
    one = PoolFormerConfig(**{**SMALL, "num_labels": 1})
    assert metadata(one, PROCESSOR, {0: "age"}, (96, 96))["output"].endswith("[batch, 1]; the predicted numbers")


def test_names_for_another_number_of_classes_are_refused(tmp_path):
    for names in ({0: "cat"}, [*"abcdefgh"]):
        with pytest.raises(InputError, match=f"from 0 to num_labels - 1, but it has {len(names)}"):
            export_model(tmp_path / "n.onnx", CONFIGS["published"], {}, PROCESSOR, names)


def test_a_missing_folder_or_a_folder_as_the_file_is_refused(tmp_path):
    config = CONFIGS["published"]
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere to write n\.onnx into"):
        export_model(tmp_path / "nowhere" / "n.onnx", config, {}, PROCESSOR, LABELS)
    (tmp_path / "n.onnx").mkdir()
    with pytest.raises(InputError, match=r"n\.onnx is a folder"):
        export_model(tmp_path / "n.onnx", config, {}, PROCESSOR, LABELS)
    (tmp_path / "n.stablehlo.json").mkdir()
    with pytest.raises(InputError, match=r"n\.stablehlo\.json is a folder"):
        export_model(tmp_path / "n.stablehlo", config, {}, PROCESSOR, LABELS)


def test_a_failed_write_leaves_neither_file_and_touches_no_other_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    (tmp_path / ".n.stablehlo.tmp").write_text("another process's")
    config = TWO_STAGES
    with pytest.raises(OSError, match=r"Cannot write .*n\.stablehlo: No space left on device"):
        export_model(tmp_path / "n.stablehlo", config, random_variables(config)[1], PROCESSOR)
    assert [path.name for path in tmp_path.iterdir()] == [".n.stablehlo.tmp"]


def test_a_kill_between_two_files_leaves_no_network_beside_the_metadata_of_another(tmp_path, monkeypatch):
    path, facts, replace = tmp_path / "n.stablehlo", tmp_path / "n.stablehlo.json", Path.replace
    for file in (path, facts):
        file.write_text("old")

    def killed(source, target):
        if target == path:
            raise KeyboardInterrupt
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        export_model(path, TWO_STAGES, random_variables(TWO_STAGES)[1], PROCESSOR)
    assert facts.read_text() != "old" and not path.exists()


OF_ONE_BLOCK = {0: "ant", 1: "bee", 2: "cat"}


@pytest.mark.parametrize("content", [b"", b"no network"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("n.onnx", marks=needs("onnxruntime")),
        pytest.param("n.xml", marks=NEEDS_OPENVINO),
        "n.stablehlo",
    ],
)
def test_a_damaged_exported_file_is_named(tmp_path, name, content):
    (tmp_path / "n.stablehlo.json").write_text(json.dumps(metadata(ONE_BLOCK, PROCESSOR, OF_ONE_BLOCK, (64, 64))))
    (tmp_path / "n.bin").write_bytes(b"")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} cannot be used .* Expected a file of python -m poolformer_jax"):
        verify_file(tmp_path / name, ONE_BLOCK, {})


@pytest.mark.parametrize("labels", [{"0": "cat"}, {"0": "cat", "1": None, "2": "dog"}, {"x": "cat"}])
def test_names_that_are_not_one_text_for_each_class_are_refused(tmp_path, labels):
    facts = metadata(ONE_BLOCK, PROCESSOR, OF_ONE_BLOCK, (64, 64)) | {"id2label": json.dumps(labels)}
    (tmp_path / "n.stablehlo.json").write_text(json.dumps(facts))
    (tmp_path / "n.stablehlo").write_bytes(b"")
    with pytest.raises(InputError, match=r"The metadata of .*n\.stablehlo is malformed: (.|\n)*id2label"):
        verify_file(tmp_path / "n.stablehlo", ONE_BLOCK, {})


def test_an_unknown_ending_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Expected it to end in \.stablehlo or \.onnx or \.xml"):
        export_model(tmp_path / "network.pb", CONFIGS["published"], {}, PROCESSOR, LABELS)


def test_a_missing_package_is_named_with_the_extra_that_installs_it(tmp_path, monkeypatch):
    def serialize(exported):
        raise ModuleNotFoundError("No module named 'flatbuffers'")

    monkeypatch.setattr(jax.export.Exported, "serialize", serialize)
    monkeypatch.setitem(sys.modules, "onnx", None)
    _, variables = random_variables(TWO_STAGES)
    for ending, module in ((".onnx", "onnx"), (".stablehlo", "flatbuffers")):
        with pytest.raises(ModuleNotFoundError, match=rf"(?s){module}.*pip install -e '\.\[export\]'"):
            export_model(tmp_path / f"n{ending}", TWO_STAGES, variables, PROCESSOR)
    assert not list(tmp_path.iterdir())

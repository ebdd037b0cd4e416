"""Exported files compute the network's logits, also where this package is not installed."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from exports import (
    CONFIGS,
    NEEDS_OPENVINO,
    ONE_BLOCK,
    ONNX_RUNTIME,
    OPENVINO,
    check_logits,
    check_metadata,
    labels_of,
    pixels_and_logits,
)
from poolformer_jax import PoolFormerConfig, export_model
from poolformer_jax.inference import load_onnxruntime, load_openvino, onnxruntime_session, run_session, to_onnx
from poolformer_jax.inference.folding import fold
from poolformer_jax.inference.onnx_operations import takes_any_size
from poolformer_jax.network import HIDDEN_ACTS
from poolformer_jax.weights import class_names
from small_networks import FAMILY, LABELS, PROCESSOR, random_variables

WITHOUT_THIS_PACKAGE = """
import sys


class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "poolformer_jax":
            raise ModuleNotFoundError("this package is not installed here")


sys.meta_path.insert(0, NotInstalled())
import jax, jax.export, numpy

folder = sys.argv[1]
network = jax.export.deserialize(bytearray(open(f"{folder}/network.stablehlo", "rb").read()))
for batch in (1, 3):
    pixels = numpy.load(f"{folder}/pixels.npy")[:batch]
    numpy.save(f"{folder}/logits_{batch}.npy", network.call(pixels))
print(sorted(network.platforms))
"""


def test_stablehlo_has_every_token_mixer_and_by_default_the_networks_labels(tmp_path):
    config = CONFIGS["ablation"]
    _, variables = random_variables(config)
    assert 0 < export_model(tmp_path / "network.stablehlo", config, variables, PROCESSOR) < 1e-5
    facts = json.loads((tmp_path / "network.stablehlo.json").read_text())
    assert json.loads(facts["id2label"]) == {str(index): name for index, name in class_names(config).items()}


def test_a_mesh_set_by_the_caller_has_no_effect(tmp_path):
    _, variables = random_variables(ONE_BLOCK)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        assert export_model(tmp_path / "network.stablehlo", ONE_BLOCK, variables, PROCESSOR) < 1e-5


@pytest.mark.slow
def test_stablehlo_runs_without_this_package(tmp_path):
    config = CONFIGS["published"]
    variables, pixels, expected = pixels_and_logits(config)
    difference = export_model(tmp_path / "network.stablehlo", config, variables, PROCESSOR, LABELS)
    assert 0 < difference < 1e-5
    np.save(tmp_path / "pixels.npy", pixels)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", WITHOUT_THIS_PACKAGE, str(tmp_path)]
    output = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=True).stdout
    assert output.strip() == "['cpu', 'cuda', 'tpu']"
    check_logits(lambda batch, _: np.load(tmp_path / f"logits_{len(batch)}.npy"), pixels, expected)
    check_metadata(json.loads((tmp_path / "network.stablehlo.json").read_text()), config)


# A later test covers the published head.
@pytest.mark.parametrize(
    "name", ["timm", "ablation", "headless", pytest.param("ablation, one norm for all", marks=pytest.mark.slow)]
)
def test_onnx_runtime_computes_the_same_logits_at_any_batch_size(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    config = CONFIGS[name]
    variables, pixels, expected = pixels_and_logits(config)
    path = tmp_path / "network.onnx"
    assert 0 < export_model(path, config, variables, PROCESSOR, labels_of(config)) < 1e-5
    check_logits(load_onnxruntime(path), pixels, expected)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    check_metadata(session.get_modelmeta().custom_metadata_map, config)
    assert [file.name for file in tmp_path.iterdir()] == ["network.onnx"]


@pytest.mark.parametrize("activation", HIDDEN_ACTS)
def test_onnx_has_every_activation(activation):
    pytest.importorskip("onnxruntime")
    config = dataclasses.replace(ONE_BLOCK, hidden_act=activation)
    model, variables = random_variables(config)
    pixels = 4 * np.random.default_rng(3).standard_normal((1, 8, 8, 3)).astype(np.float32)
    expected = jax.jit(model.apply)(variables, pixels).logits
    session = onnxruntime_session(to_onnx(config, fold(config, variables), (8, 8), {}))
    logits = run_session(session, pixels, "logits")
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "caformer")) for kind in FAMILY]
)
@pytest.mark.parametrize("load", [ONNX_RUNTIME, OPENVINO])
def test_runtimes_compute_every_network_of_the_second_paper(load, kind, tmp_path):
    config = FAMILY[kind]
    assert takes_any_size(config) == (kind != "randformer")
    model, variables = random_variables(config)
    size = (64, 64) if kind == "randformer" else (33, 70)  # the file is made for 64 x 64
    pixels = np.random.default_rng(3).standard_normal((3, *size, 3)).astype(np.float32)
    path = tmp_path / "network.onnx"
    path.write_bytes(to_onnx(config, fold(config, variables), (64, 64), {}, any_size=takes_any_size(config)))
    check_logits(load(path), pixels, np.asarray(jax.jit(model.apply)(variables, pixels).logits))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["randformer", "caformer"])
def test_stablehlo_has_networks_of_the_second_paper(kind, tmp_path):
    variables = random_variables(FAMILY[kind])[1]
    assert 0 < export_model(tmp_path / "network.stablehlo", FAMILY[kind], variables, PROCESSOR, LABELS) < 1e-5


@NEEDS_OPENVINO
@pytest.mark.parametrize("name", ["published", pytest.param("ablation", marks=pytest.mark.slow)])
def test_openvino_computes_the_same_logits_at_any_batch_size(name, tmp_path):
    variables, pixels, expected = pixels_and_logits(CONFIGS[name])
    export_model(tmp_path / "network.onnx", CONFIGS[name], variables, PROCESSOR, LABELS)
    check_logits(load_openvino(tmp_path / "network.onnx"), pixels, expected)


@pytest.mark.slow
@pytest.mark.parametrize("load", [ONNX_RUNTIME, OPENVINO])
@pytest.mark.parametrize("variant", ["caformer_s18", "poolformerv2_s12"])
def test_runtimes_compute_published_networks(variant, load, tmp_path):
    config = PoolFormerConfig.from_variant(variant)
    model, variables = random_variables(config)
    pixels = np.random.default_rng(3).standard_normal((3, 224, 224, 3)).astype(np.float32)
    path = tmp_path / "network.onnx"
    path.write_bytes(to_onnx(config, fold(config, variables), (224, 224), {}, any_size=True))
    check_logits(load(path), pixels, np.asarray(jax.jit(model.apply)(variables, pixels).logits))


@pytest.mark.parametrize("image_size", [None, (33, 70)], ids=["any size", "fixed size"])
def test_onnx_pools_at_edges_and_corners_as_the_network_does(tmp_path, image_size):
    # The last stage of a 33 pixel image is 2 x 2: every position of it is a corner. Wider than high, so that a
    # transposed pooling window would show too; an impulse in each corner of the image, so that each one matters.
    onnxruntime = pytest.importorskip("onnxruntime")
    config = CONFIGS["published"]
    model, variables = random_variables(config)
    path = tmp_path / "network.onnx"
    export_model(path, config, variables, PROCESSOR, LABELS, image_size=image_size)
    pixels = np.zeros((4, 33, 70, 3), np.float32)
    for index, (row, column) in enumerate([(0, 0), (0, -1), (-1, 0), (-1, -1)]):
        pixels[index, row, column] = 50
    (logits,) = onnxruntime.InferenceSession(path).run(None, {"pixel_values": pixels})
    expected = np.asarray(jax.jit(model.apply)(variables, pixels).logits)
    assert np.abs(expected - expected[0]).max(1)[1:].min() > 1e-3
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())

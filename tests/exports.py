"""Networks that are exported, and the runtimes that run them."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest

from poolformer_jax import PoolFormerConfig, PoolFormerImageProcessor
from poolformer_jax.inference import load_onnxruntime, load_openvino
from small_networks import EVERY_MIXER, LABELS, PROCESSOR, TINY, TWO_STAGES, random_variables


def needs(package):
    """Not pytest.importorskip: without `import_runtime` OpenVINO's telemetry forks this process."""
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


ONNX_RUNTIME = pytest.param(load_onnxruntime, id="onnxruntime", marks=needs("onnxruntime"))
OPENVINO = pytest.param(load_openvino, id="openvino", marks=(needs("openvino"), pytest.mark.slow))
NEEDS_OPENVINO = needs("openvino")
SMALL = {**TINY, "depths": (1, 1, 1, 1)}
CONFIGS = {
    "published": PoolFormerConfig(**SMALL),
    "timm": dataclasses.replace(TWO_STAGES, head_order="pool_norm", num_labels=7),
    "ablation": PoolFormerConfig(**SMALL, token_mixers=EVERY_MIXER, norm="layer_norm", image_size=64),
    "ablation, one norm for all": PoolFormerConfig(**SMALL, token_mixers=EVERY_MIXER, image_size=64),
    "headless": dataclasses.replace(TWO_STAGES, num_labels=0, pool_size=5),
}
ONE_BLOCK = PoolFormerConfig(depths=(1,), hidden_sizes=(8,), patch_sizes=(4,), strides=(4,), padding=(0,), num_labels=3)


def pixels_and_logits(config, batch=3):
    """Random variables, random pixels, and the network's logits for them."""
    model, variables = random_variables(config)
    pixels = np.random.default_rng(3).standard_normal((batch, 64, 64, config.num_channels)).astype(np.float32)
    return variables, pixels, np.asarray(jax.jit(model.apply)(variables, pixels).logits)


def check_logits(run, pixels, expected):
    """Checks the function `run` of pixels and the output's name for two batch sizes."""
    for batch in (1, 3):
        logits = run(pixels[:batch], "logits")
        np.testing.assert_allclose(logits, expected[:batch], rtol=0, atol=1e-5 * np.abs(expected).max())


def labels_of(config):
    return LABELS if config.num_labels else {}


def check_metadata(facts, config):
    """Checks that an exported file's metadata are those of a network with the tests' preprocessing and labels."""
    assert PoolFormerConfig.from_dict(json.loads(facts["config"])) == config
    assert PoolFormerImageProcessor.from_dict(json.loads(facts["preprocessor_config"])) == PROCESSOR
    assert json.loads(facts["id2label"]) == {str(index): label for index, label in labels_of(config).items()}
    assert facts["input"].startswith("pixel_values: float32 [batch, ")
    assert facts["producer"].startswith("poolformer-jax ")

"""`python -m convert --verify` compares the authors' ablations with PyTorch, too, and finds a wrong one."""

import dataclasses
import importlib.util

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from convert import pytorch
from convert.conversion import convert
from convert.verification import verify
from live import peers
from poolformer_jax.network import PoolFormerConfig, PoolFormerForImageClassification
from poolformer_jax.weights import identify_model, open_model, open_weights, save_pretrained
from saved_models import CONFIG, make_variables

pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.live
CHANGES = [{}, {"norm": "layer_norm"}, {"token_mixers": ("identity",) * 4}]


@pytest.mark.parametrize("changes", CHANGES)
def test_every_network_with_the_names_of_a_size_is_compared_with_pytorch(tmp_path, changes):
    config = dataclasses.replace(CONFIG, **changes)
    save_pretrained(tmp_path / "theirs", PoolFormerForImageClassification(config), make_variables(config), "sail")
    source = open_model(tmp_path / "theirs")
    mappings = convert(source, tmp_path / "model", "jax", lambda _: None, "report.json")
    result = verify(source, tmp_path / "model", mappings)
    assert result.passed and result.not_compared is None and result.not_verified is None
    for other in (other for other in CHANGES if other != changes):
        wrong = identify_model(
            source.files, open_weights(source.files.weights), config=dataclasses.replace(CONFIG, **other)
        )
        assert not verify(wrong, tmp_path / "model", mappings).passed


@pytest.mark.parametrize(("variant", "layout"), [("s12", "timm"), ("caformer_s18", "sail")])
def test_weights_of_timms_networks_are_compared_with_timm(tmp_path, monkeypatch, variant, layout):
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    peers.timm()
    epsilon = 1e-6 if layout == "timm" else 1e-5
    config = PoolFormerConfig.from_variant(variant, num_labels=3, head_order="pool_norm", head_norm_epsilon=epsilon)
    variables = make_variables(config)
    save_pretrained(tmp_path / "theirs", PoolFormerForImageClassification(config), variables, layout)
    source = open_model(tmp_path / "theirs")
    mappings = convert(source, tmp_path / "model", "jax", lambda _: None, "report.json")
    monkeypatch.setattr(pytorch, "_model", lambda source: pytest.fail("compared with transformers"))
    result = verify(source, tmp_path / "model", mappings)
    assert result.passed and list(result.differences)[-1] == "logits"
    weights = tmp_path / "model" / "flax_model.safetensors"
    arrays = load_file(weights)
    with safe_open(weights, "numpy") as opened:
        save_file({**arrays, "stem/conv/bias": arrays["stem/conv/bias"][::-1].copy()}, weights, opened.metadata())
    assert verify(source, tmp_path / "model", mappings).first_difference == "stage 0"

"""`--verify` compares the written arrays and logits with the source's."""

import numpy as np
import pytest

import archives
from conversions import FIXTURES, SAIL, report_of, run
from convert.conversion import convert
from convert.verification import relative_difference, verify
from golden.fixture_values import parameter
from poolformer_jax.weights import load_pretrained, open_model, open_weights


def test_verification_finds_one_changed_bit(tmp_path):
    source = open_model(FIXTURES / "hf.bin")
    mapped = convert(source, tmp_path / "model", "jax", lambda size: None, "report.json")
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

"""`python -m convert --verify` compares the authors' ablations with PyTorch, too, and finds a wrong one."""

import dataclasses

import pytest

from convert.conversion import convert
from convert.verification import verify
from poolformer_jax.network import PoolFormerForImageClassification
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
    mappings = convert(source, tmp_path / "model", "jax", lambda _: None)
    result = verify(source, tmp_path / "model", mappings)
    assert result.passed and result.not_compared is None and result.not_verified is None
    for other in (other for other in CHANGES if other != changes):
        wrong = identify_model(
            source.files, open_weights(source.files.weights), config=dataclasses.replace(CONFIG, **other)
        )
        assert not verify(wrong, tmp_path / "model", mappings).passed

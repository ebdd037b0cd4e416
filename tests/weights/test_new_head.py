"""Loaded weights keep their head, or get a new one with reset_head=True."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paths import TESTS
from poolformer_jax import load_pretrained
from saved_models import LABELS, same

FIXTURES = TESTS / "fixtures"


def test_another_number_of_classes_needs_a_new_head():
    source = FIXTURES / "hf_sharded"
    with pytest.raises(ValueError, match=r"head for 3 classes, and num_labels=10\..*reset_head=True"):
        load_pretrained(source, num_labels=10)
    kept, before = load_pretrained(source, num_labels=3)
    assert kept.config.id2label == LABELS
    model, after = load_pretrained(source, num_labels=10, reset_head=True)
    assert (model.config.num_labels, model.config.id2label) == (10, None)
    head = after["params"].pop("head")
    assert (head["kernel"].shape, float(jnp.abs(head["bias"]).max())) == ((8, 10), 0.0)
    assert 0.01 < float(head["kernel"].std()) < 0.03
    del before["params"]["head"]
    assert same(after, before)


@pytest.mark.parametrize("num_labels", [-1, True])
def test_a_head_for_an_invalid_number_of_classes_is_refused(num_labels):
    with pytest.raises(ValueError, match=rf"num_labels={num_labels!r}: expected (0|a whole number)"):
        load_pretrained(FIXTURES / "hf_sharded", num_labels=num_labels, reset_head=True)


def test_the_key_determines_the_new_head_and_nothing_else():
    def load(**options):
        return load_pretrained(FIXTURES / "hf_sharded", num_labels=10, reset_head=True, **options)

    model, first = load(key=jax.random.key(1))
    _, again = load(key=jax.random.key(1))
    other_model, other = load(key=jax.random.key(2))
    assert same(again, first)
    assert other_model == model
    assert not np.array_equal(other["params"]["head"].pop("kernel"), first["params"]["head"].pop("kernel"))
    assert same(other, first)
    assert same(load()[1], load(key=jax.random.key(0))[1])


def test_a_key_without_a_new_head_is_refused():
    with pytest.raises(ValueError, match=r"A key was given without reset_head=True"):
        load_pretrained(FIXTURES / "hf_sharded", key=jax.random.key(1))


def test_a_backbone_needs_a_new_norm_and_head():
    with pytest.raises(ValueError, match=r"backbone without final norm and head\. Pass num_labels=\.\.\. and"):
        load_pretrained(FIXTURES / "hf_backbone.bin")
    model, variables = load_pretrained(FIXTURES / "hf_backbone.bin", num_labels=5, reset_head=True)
    assert jax.jit(model.apply)(variables, np.ones((1, 64, 64, 3), np.float32)).logits.shape == (1, 5)
    _, features = load_pretrained(FIXTURES / "hf_backbone.bin", num_labels=0, reset_head=True)
    assert set(features["params"]) >= {"norm"} and "head" not in features["params"]

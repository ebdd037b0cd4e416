"""Saved folders carry a model card that the Hub can read, and that never replaces the user's README.md."""

import json
import os

import numpy as np
import pytest

from poolformer_jax import FlaxPoolFormerModel, PoolFormerConfig
from poolformer_jax.weights import leaves, write_model
from saved_models import CONFIG, save
from selection import slow_after


@pytest.mark.parametrize(
    ("layout", "library", "code"),
    [
        ("jax", "poolformer_jax", 'load_pretrained("model")'),
        ("hf", "transformers", 'AutoModelForImageClassification.from_pretrained("model")'),
        ("sail", "pytorch", 'torch.load("model/model.pth.tar")'),
    ],
)
def test_a_card_says_what_the_model_is_and_how_to_load_it(tmp_path, layout, library, code):
    ModelCard = pytest.importorskip("huggingface_hub").ModelCard
    save(tmp_path / "model", layout, metrics={"top1": 0.9375})
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == (library, "image-classification")
    assert card.data.license is None
    assert code in card.text and "3 classes" in card.text and "| top1 | 0.9375 |" in card.text


@pytest.mark.parametrize(("layout", "name"), slow_after(1, [("hf", "AutoModel"), ("jax", "FlaxPoolFormerModel")]))
def test_a_card_of_a_backbone_names_a_class_without_a_head(tmp_path, layout, name):
    FlaxPoolFormerModel(CONFIG).save_pretrained(tmp_path / "model", layout=layout)
    card = (tmp_path / "model" / "README.md").read_text()
    assert f'{name}.from_pretrained("model")' in card and "classes" not in card
    assert "pipeline_tag: image-feature-extraction" in card


def test_a_card_is_rewritten_until_the_user_edits_it(tmp_path):
    path = tmp_path / "model" / "README.md"
    save(tmp_path / "model", metrics={"top1": 0.25})
    save(tmp_path / "model", metrics={"top1": 0.75})
    assert "0.75" in path.read_text() and "0.25" not in path.read_text()
    path.write_text("My model")
    save(tmp_path / "model")
    assert path.read_text() == "My model"


def test_a_folder_whose_name_is_not_utf8_takes_a_model(tmp_path):
    folder = tmp_path / os.fsdecode(b"mod\xe8le")
    save(folder)
    assert r"# mod\xe8le" in (folder / "README.md").read_text()


def test_a_published_network_gets_imagenets_names_for_transformers(tmp_path):
    config = PoolFormerConfig.from_variant("s12")
    write_model(
        tmp_path / "model", config, "hf", (np.zeros(leaf.stored_shape, np.float32) for leaf in leaves(config, "hf"))
    )
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written["id2label"]["281"] == "tabby, tabby cat"
    assert written["label2id"]["tabby, tabby cat"] == 281


def test_the_code_of_a_card_does_not_classify_without_preprocessing(tmp_path):
    save(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert 'load_pretrained("model")' in card and "ImageClassifier" not in card

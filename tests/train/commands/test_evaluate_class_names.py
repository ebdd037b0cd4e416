"""`python -m train evaluate` matches the classes of the data with those of the model."""

import json
import os
import shutil

import numpy as np
import pytest

from evaluations import PROCESSOR, evaluate, write_classes, write_model
from poolformer_jax import PoolFormerConfig, save_pretrained
from poolformer_jax.images import imagenet_labels
from poolformer_jax.weights import published
from small_networks import random_variables


def test_classes_and_folders_may_have_any_name(tmp_path, capsys):
    names = ("[bold]", "$a_{b$", os.fsdecode(b"caf\xe9"))
    pool = write_classes(tmp_path / os.fsdecode(b"p\xf6\xf6l"), names, images=2)
    given = write_model(tmp_path / "model", sorted((*names[:2], r"caf\xe9")))
    assert evaluate(given, f"folder:{pool}", output=tmp_path / "out").examples == 6
    printed = capsys.readouterr().out
    assert printed.encode()
    for name in ("[bold]", "$a_{b$", r"caf\xe9", r"p\xf6\xf6l"):
        assert name in printed
    assert (tmp_path / "out" / "confusion.png").exists()


def test_a_model_of_other_classes_is_refused_although_there_are_as_many(model, tmp_path):
    pool = write_classes(tmp_path / "pool", ("bee", "cat", "zebra"), images=2)
    with pytest.raises(ValueError, match="only some classes in common") as caught:
        evaluate(model, f"folder:{pool}")
    for line in ("label 0: ant in the model, bee in the data", "label 2: cat in the model, zebra in the data"):
        assert line in str(caught.value)


def test_data_of_some_of_the_models_classes_are_scored_by_their_names(model, tmp_path, capsys):
    whole = write_classes(tmp_path / "whole", ("ant", "bee", "cat"), images=4)
    wanted = evaluate(model, f"folder:{whole}")
    shutil.rmtree(whole / "bee")
    result = evaluate(model, f"folder:{whole}", output=tmp_path / "out")
    assert "2 of 3 classes have images here" in capsys.readouterr().out
    np.testing.assert_array_equal(result.confusion, [[1], [0], [1]] * wanted.confusion)
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [row["examples"] for row in report["classes"]] == [4, 0, 4]
    (whole / "ant").rename(whole / "zebra")
    with pytest.raises(ValueError, match=r"has 3 classes, and .* has 2"):
        evaluate(model, f"folder:{whole}")


@pytest.mark.parametrize("labels", [imagenet_labels().values(), 1000], ids=["with names", "of a published head"])
def test_folders_of_a_part_of_imagenet_are_scored_by_their_wordnet_ids(tmp_path, monkeypatch, capsys, labels):
    if labels == 1000:  # without names, the architecture implies ImageNet's classes
        monkeypatch.setattr(published, "published_variant", lambda config: "s12")
    given = write_model(tmp_path / "model", labels)
    pool = write_classes(tmp_path / "pool", ("n01440764", "n02012849", "n03126707", "n15075141"), images=2)
    result = evaluate(given, f"folder:{pool}")
    assert np.flatnonzero(result.class_examples).tolist() == [0, 134, 517, 999]  # tench, both cranes, toilet tissue
    assert "4 of 1000 classes have images here" in capsys.readouterr().out
    (pool / "n01440764").rename(pool / "n00015388")  # animal: no class of its own
    with pytest.raises(ValueError, match=r"has 1000 classes, and .* has 4"):
        evaluate(given, f"folder:{pool}")


def test_a_name_of_two_classes_does_not_affect_other_classes(tmp_path):
    given = write_model(tmp_path / "model", ("crane", "tench", "crane"))
    assert evaluate(given, f"folder:{write_classes(tmp_path / 'sound', ('tench',), images=2)}").examples == 2
    with pytest.raises(ValueError, match=r"has 3 classes, and .* has 1"):
        evaluate(given, f"folder:{write_classes(tmp_path / 'ambiguous', ('crane',), images=2)}")


def always(answer, folder, labels):
    """A model that answers every image with one label; its path."""
    config = PoolFormerConfig(
        depths=(1,) * 4,
        hidden_sizes=(2, 4, 6, 8),
        num_labels=len(labels) if labels else 12,
        id2label=dict(enumerate(labels)) if labels else None,
    )
    model, variables = random_variables(config)
    bias = np.eye(config.num_labels, dtype=np.float32)[answer]
    head = {"kernel": np.zeros((8, config.num_labels), np.float32), "bias": bias}
    save_pretrained(folder, model, {"params": variables["params"] | {"head": head}}, image_processor=PROCESSOR)
    return str(folder)


WORDS = [f"word {chr(97 + number)}" for number in range(12)]


def right_classes(model, data, folder, **options):
    """Names of the classes of which the model recognises every image."""
    evaluate(model, data, output=folder, **options)
    rows = json.loads((folder / "evaluation.json").read_text())["classes"]
    return [row["class"] for row in rows if row["top1"] == 1]


def test_folders_of_numbers_are_scored_by_their_numbers(tmp_path):
    pool = write_classes(tmp_path / "pool", map(str, range(12)), images=1)
    assert right_classes(always(2, tmp_path / "model", WORDS), f"folder:{pool}", tmp_path / "out") == ["2"]
    (pool / "0").rename(pool / "12")  # 1 to 12: not the numbers of labels
    with pytest.raises(ValueError, match=r"cannot be compared by name.*--class-map\)"):
        evaluate(str(tmp_path / "model"), f"folder:{pool}")


def test_a_model_without_names_is_refused_if_libraries_sort_the_folders_differently(tmp_path):
    model = always(2, tmp_path / "model", None)
    pool = write_classes(tmp_path / "pool", [f"class_{number}" for number in range(12)], images=1)
    with pytest.raises(ValueError, match="cannot be compared by name"):
        evaluate(model, f"folder:{pool}")
    class_map = tmp_path / "as torchvision sorts.txt"
    class_map.write_text("\n".join(sorted(path.name for path in pool.iterdir())))
    assert right_classes(model, f"folder:{pool}", tmp_path / "out", class_map=class_map) == ["class_10"]
    padded = write_classes(tmp_path / "padded", [f"{number:02}" for number in range(12)], images=1)
    assert right_classes(model, f"folder:{padded}", tmp_path / "out") == ["02"]


def test_the_same_names_in_another_order_are_scored_by_name(tmp_path):
    sorted_as_text = sorted(f"class_{number}" for number in range(12))  # a model that was trained in this order
    pool = write_classes(tmp_path / "pool", sorted_as_text, images=1)
    model = always(2, tmp_path / "model", sorted_as_text)
    assert right_classes(model, f"folder:{pool}", tmp_path / "out") == ["class_10"]


def test_names_in_another_vocabulary_need_a_class_map(model, tmp_path):
    ids = ("n02219486", "n02206856", "n02121808")  # ant, bee, cat
    pool = write_classes(tmp_path / "pool", ids, images=2)
    with pytest.raises(ValueError, match=r"\(ant, bee, cat\) and .* cannot be compared by name"):
        evaluate(model, f"folder:{pool}")
    (tmp_path / "map.txt").write_text("\n".join(ids))
    assert evaluate(model, f"folder:{pool}", class_map=tmp_path / "map.txt").examples == 6
    (tmp_path / "map.txt").write_text("n02219486\ncat\nbee")
    other = write_classes(tmp_path / "other", ("n02219486", "cat", "bee"), images=2)
    with pytest.raises(ValueError, match="label 1: bee in the model, cat in the data"):
        evaluate(model, f"folder:{other}", class_map=tmp_path / "map.txt")


def test_wordnet_ids_find_the_words_of_a_model_of_some_of_imagenets_classes(tmp_path):
    model = always(0, tmp_path / "model", ["tench, Tinca tinca", "cassette player", "golf ball"])
    pool = write_classes(tmp_path / "pool", ("n01440764", "n02979186", "n03445777"), images=1)
    assert right_classes(model, f"folder:{pool}", tmp_path / "out") == ["tench, Tinca tinca"]


def test_the_two_cranes_of_imagenet_are_those_of_a_model_whatever_prepare_adds_to_their_names(tmp_path):
    names = ("crane", "tench, Tinca tinca", "crane")
    pool = write_classes(tmp_path / "pool", ("crane (n02012849)", "crane (n03126707)", "tench, Tinca tinca"), images=2)
    in_order = write_model(tmp_path / "in_order", (names[0], names[2], names[1]))
    assert evaluate(in_order, f"folder:{pool}").examples == 6
    with pytest.raises(ValueError, match="the same classes in another order"):
        evaluate(write_model(tmp_path / "other", names), f"folder:{pool}")

"""Evaluation on ImageNet's further test sets: ReaL labels, subsets of classes, ImageNet-C, flips, timm's table."""

import csv
import io
import json

import jax
import numpy as np
import pytest
from PIL import ExifTags, Image
from rich.console import Console

from poolformer_jax import PoolFormerConfig, PoolFormerImageProcessor, save_pretrained
from poolformer_jax.errors import InputError
from poolformer_jax.images import imagenet_labels, imagenet_wordnet_ids
from small_networks import random_variables
from train.commands.evaluate import run_evaluation
from train.commands.evaluate_config import EvaluateConfig
from train.commands.imagenet_sets import ALEXNET_ERRORS, corruption_folders, mean_corruption_error
from train.data import TimmImageProcessor
from training import ALONE

PROCESSOR = PoolFormerImageProcessor(
    size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, crop_pct=0.8, image_mean=(0.5,) * 3
)
LABELS = (1, 7, 130, 131, 132, 400, 999)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random network with ImageNet's classes."""
    folder = tmp_path_factory.mktemp("model")
    config = PoolFormerConfig(depths=(1,) * 4, hidden_sizes=(2, 4, 6, 8), id2label=imagenet_labels())
    network, variables = random_variables(config)
    save_pretrained(folder, network, variables, image_processor=PROCESSOR)
    return folder


def evaluate(model, data, batch_size=16, **options):
    config = EvaluateConfig(str(model), data, batch_size=batch_size, workers=0, distributed=ALONE, **options)
    return run_evaluation(config, Console(quiet=True))


def write_class_folders(root, mirrored=False, images=4):
    """A few classes of ImageNet, with the names of validation images."""
    names = imagenet_wordnet_ids()
    for place, label in enumerate(LABELS):
        (root / names[label]).mkdir(parents=True)
        for number in range(images):
            pixels = np.random.default_rng([label, number]).integers(0, 256, (40, 40, 3), np.uint8)
            name = f"ILSVRC2012_val_{images * place + number + 1:08d}.JPEG"
            Image.fromarray(pixels[:, ::-1] if mirrored else pixels).save(root / names[label] / name, "PNG")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_class_folders(tmp_path_factory.mktemp("imagenet-a"))


@pytest.fixture(scope="module")
def logits(model, folder, tmp_path_factory):
    """By image: the logits, and the label."""
    found = evaluate(model, f"folder:{folder}", output=tmp_path_factory.mktemp("out")).predictions
    return found.logits, found.label


def test_answers_can_be_limited_to_the_classes_of_the_data(model, folder, logits):
    outputs, labels = logits
    chosen = np.array(LABELS)
    places = np.searchsorted(chosen, labels)
    order = np.argsort(-outputs[:, chosen], axis=1)
    found = evaluate(model, f"folder:{folder}", classes="data")
    assert found.top1 == np.mean(order[:, 0] == places)
    assert found.top5 == np.mean((order[:, :5] == places[:, None]).any(1))
    shares = jax.nn.log_softmax(outputs[:, chosen])[np.arange(len(labels)), places]
    assert found.loss == pytest.approx(-float(shares.mean()), rel=1e-5)
    assert found.top1 > evaluate(model, f"folder:{folder}").top1  # among 1000 classes a random network is never right


def test_timms_preprocessing_keeps_the_orientation_and_rounds_the_place_of_the_crop_to_even():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    exif, file = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    size = {"height": 2, "width": 2}
    found = TimmImageProcessor(do_resize=False, crop_size=size).resize_and_crop(file.getvalue())
    np.testing.assert_array_equal(found, pixels[2:4, 2:4])  # round(1.5) and round(2.5)
    usual = PoolFormerImageProcessor(do_resize=False, crop_size=size).resize_and_crop(file.getvalue())
    np.testing.assert_array_equal(usual, np.rot90(pixels, -1)[2:4, 1:3])


def test_real_labels_count_any_of_them_and_leave_out_images_without(model, folder, logits, tmp_path, capsys):
    order = np.argsort(-logits[0], axis=1)
    real = [[] for _ in range(len(order))]
    real[0], real[5], real[6], real[9] = [int(order[0, 0]), 3], [int(order[5, 4])], [int(order[6, 7])], [2, 4]
    (tmp_path / "real.json").write_text(json.dumps(real))
    evaluate(model, f"folder:{folder}", real_labels=tmp_path / "real.json", results_file=tmp_path / "results.csv")
    assert "ReaL labels: top-1 25.00%  top-5 50.00%  (4 images" in capsys.readouterr().out
    with (tmp_path / "results.csv").open() as file:
        (row,) = csv.DictReader(file)
    columns = "model top1 top1_err top5 top5_err param_count img_size crop_pct interpolation"
    assert list(row) == columns.split()
    assert (row["top1"], row["top5_err"], row["img_size"], row["crop_pct"]) == ("25.0", "50.0", "32", "0.8")
    evaluate(model, f"folder:{folder}", results_file=tmp_path / "results.csv")  # replaces the model's row
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 2


def test_real_labels_need_the_names_of_validation_images(model, folder, tmp_path):
    (tmp_path / "real.json").write_text("[[1], [2]]")
    with pytest.raises(InputError, match=r"val_00000003.*Expected names from"):
        evaluate(model, f"folder:{folder}", real_labels=tmp_path / "real.json")


@pytest.mark.slow
def test_flipped_evaluation_does_not_depend_on_left_and_right(model, folder, logits, tmp_path):
    mirrored = write_class_folders(tmp_path / "mirrored", mirrored=True)
    one = evaluate(model, f"folder:{folder}", flip=True, output=tmp_path / "one").predictions.logits
    other = evaluate(model, f"folder:{mirrored}", flip=True, output=tmp_path / "other").predictions.logits
    alone = evaluate(model, f"folder:{mirrored}", output=tmp_path / "alone").predictions.logits
    np.testing.assert_allclose(one, other, atol=1e-5)
    np.testing.assert_allclose(one, (logits[0] + alone) / 2, atol=1e-5)


def test_folders_of_numbers_are_imagenet_v2(model, tmp_path, logits):
    """Its 1000 folders are the labels; numbers sort by value."""
    for label in range(1000):
        (tmp_path / str(label)).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / str(label) / "0.jpeg")
    found = evaluate(model, f"folder:{tmp_path}", batch_size=512, classes="data")
    assert (found.examples, found.class_examples.tolist()) == (1000, [1] * 1000)
    assert found.class_correct.sum() == 1  # all images are black: one answer


def test_the_mean_corruption_error_is_that_of_the_paper():
    errors = {name: [0.1, 0.2, 0.3, 0.4, 0.5] for name in ALEXNET_ERRORS}
    errors["fog"] = [0.819324] * 5  # AlexNet's
    mean, relative = mean_corruption_error(errors)
    assert relative["fog"] == pytest.approx(1)
    assert relative["snow"] == pytest.approx(0.3 / 0.866816)
    by_hand = (1 + sum(0.3 / error for name, error in ALEXNET_ERRORS.items() if name != "fog")) / 15
    assert mean == pytest.approx(by_hand)


def test_missing_corruptions_are_named(tmp_path):
    for name in ALEXNET_ERRORS:
        for severity in range(1, 6):
            (tmp_path / "archive" / name / str(severity)).mkdir(parents=True)
    assert corruption_folders(tmp_path)["fog", 3] == tmp_path / "archive" / "fog" / "3"
    (tmp_path / "archive" / "fog" / "3").rmdir()
    with pytest.raises(InputError, match=r"lacks fog/3 \(1 of 75"):
        corruption_folders(tmp_path)


@pytest.mark.slow
def test_imagenet_c_is_scored_folder_by_folder(model, tmp_path):
    folders = {
        (name, severity): tmp_path / "c" / name / str(severity) for name in ALEXNET_ERRORS for severity in range(1, 6)
    }
    for folder in folders.values():
        write_class_folders(folder, images=1)
    evaluate(model, f"imagenet-c:{tmp_path / 'c'}", classes="data", output=tmp_path / "out")
    found = json.loads((tmp_path / "out" / "imagenet-c.json").read_text())
    alone = (
        1 - evaluate(model, f"folder:{tmp_path / 'c' / 'fog' / '2'}", classes="data").top1
    )  # all folders hold the same images
    by_hand = np.mean([alone / error for error in ALEXNET_ERRORS.values()])
    assert found["mce"] == pytest.approx(by_hand)

"""Data sets: their images and splits, and the errors for layouts that cannot be used."""

import dataclasses
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from paths import TESTS
from poolformer_jax.files import files_below
from poolformer_jax.images import read_image
from train.data import DIGITS, DataConfig, describe_skipped, open_source
from train.data.sources import folders
from train.data.sources.source import SourceError, held_out
from train.recipes import RECIPES

IMAGES = TESTS / "images"


def write_images(folder, count, kind="jpg"):
    folder.mkdir(parents=True, exist_ok=True)
    with Image.open(IMAGES / "coffee.jpg") as image:
        picture = image.resize((48, 40))
    for number in range(count):
        picture.rotate(7 * number).save(folder / f"{number:03d}.{kind}")


def splits(config):
    return open_source(config, config.train_split), open_source(config, config.evaluation_split)


def ids(source):
    return [source[index]["id"] for index in range(len(source))]


def test_digits_are_always_split_in_the_same_way_with_the_same_share_of_every_digit():
    train, validation = splits(DIGITS)
    assert (len(train), len(validation)) == (1438, 359)
    assert not set(ids(train)) & set(ids(validation))
    share = np.bincount(validation.labels) / (np.bincount(train.labels) + np.bincount(validation.labels))
    assert np.abs(share - 0.2).max() < 0.005
    assert train.class_names == tuple("0123456789")
    # Exactly this choice: a run resumed after an upgrade must not train on its evaluation images.
    assert ids(validation)[:4] == ids(splits(DIGITS)[1])[:4] == FIRST_HELD_OUT_DIGITS
    assert (train.images.dtype, train.images.shape[1:], train.images.max()) == (np.uint8, (8, 8), 255)


FIRST_HELD_OUT_DIGITS = ["digits/0004", "digits/0027", "digits/0034", "digits/0052"]


def test_held_out_examples_depend_on_names_alone():
    names = [f"{number}.jpg" for number in range(40)]
    labels = np.arange(40) % 2
    chosen = {name for name, out in zip(names, held_out(names, labels, 0.25)) if out}
    assert len(chosen) == 10
    backwards = held_out(names[::-1], labels[::-1], 0.25)
    assert {name for name, out in zip(names[::-1], backwards) if out} == chosen


def test_held_out_never_takes_all_or_none_of_a_class():
    labels = np.array([0, 1, 1, 2, 2, 2])
    chosen = held_out(list("abcdef"), labels, 0.01)
    assert np.bincount(labels, weights=chosen, minlength=3).tolist() == [0, 1, 1]
    assert np.bincount(labels, weights=held_out(list("abcdef"), labels, 0.99)).tolist() == [0, 1, 2]


def test_synthetic_images_have_any_size_and_their_splits_share_no_image():
    config = DataConfig(source="synthetic", image_size=40, synthetic_examples=30)
    train, validation = splits(config)
    assert train.images.shape == (30, 40, 40, 3)
    np.testing.assert_array_equal(train.images, splits(config)[0].images)
    assert not np.array_equal(train.images[0], validation.images[0])
    with pytest.raises(SourceError, match="no split 'test'"):
        open_source(config, "test")


@pytest.mark.parametrize("name", ["validation", "val"])
def test_class_folders_below_splits(tmp_path, name):
    write_images(tmp_path / "train" / "cat", 3)
    write_images(tmp_path / "train" / "ant" / "deeper", 2, "PNG")
    write_images(tmp_path / name / "cat", 1)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "cat" / ".hidden.jpg").write_text("no image")
    train, validation = splits(DataConfig(source=f"folder:{tmp_path}"))
    assert train.class_names == validation.class_names == ("ant", "cat")
    assert train.labels.tolist() == [0, 0, 1, 1, 1]
    assert validation.labels.tolist() == [1]
    example = validation[0]
    assert example["id"] == str(tmp_path / name / "cat" / "000.jpg")
    assert example["image"] == Path(example["id"]).read_bytes()
    assert [one["id"] for one in train.__getitems__([4, 0])] == [ids(train)[4], ids(train)[0]]


@pytest.mark.parametrize("kind", ["JPE", "avif", "tga", "webp"])
def test_class_folders_take_every_format_of_the_guide(tmp_path, kind):
    if not features.check("avif" if kind == "avif" else "webp"):
        pytest.skip("this Pillow was built without it")
    for name in ("cat", "dog"):
        write_images(tmp_path / name, 3, kind)
        write_images(tmp_path / name, 2, "jpg")
        for other in ("notes.txt", "README", "drawing.eps", "scan.jp2"):
            (tmp_path / name / other).write_text("no image")
    train, validation = splits(DataConfig(source=f"folder:{tmp_path}"))
    assert sorted(ids(train) + ids(validation)) == sorted(
        str(path) for suffix in (kind, "jpg") for path in tmp_path.glob(f"*/*.{suffix}")
    )
    assert all(read_image(train[index]["image"]).size[0] > 0 for index in range(len(train)))
    assert train.skipped == {".txt": 2, "": 2, ".eps": 2, ".jp2": 2}


@pytest.mark.parametrize(
    ("names", "in_order"),
    [
        (["0", "1", "10", "2", "9"], ["0", "1", "2", "9", "10"]),
        (["00", "01", "10"], ["00", "01", "10"]),
        (["class_1", "class_10", "class_2"], ["class_1", "class_2", "class_10"]),
        (["Zebra", "ant", "Bee"], ["ant", "Bee", "Zebra"]),
        (["n01440764", "n15075141", "n02012849"], ["n01440764", "n02012849", "n15075141"]),
        (["a²", "a2", "a10"], ["a2", "a10", "a²"]),
    ],
)
def test_class_folders_are_in_timms_natural_order(tmp_path, names, in_order):
    for name in names:
        write_images(tmp_path / name, 2)
    train, validation = splits(DataConfig(source=f"folder:{tmp_path}"))
    assert train.class_names == validation.class_names == tuple(in_order)
    for source in (train, validation):
        assert [Path(name).parent.name for name in ids(source)] == [in_order[label] for label in source.labels]


def test_what_a_nas_or_a_file_manager_adds_is_passed_over_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "image_suffixes", lambda: frozenset({".jpg"}))  # as without pillow-heif
    for name in ("cat", "dog"):
        write_images(tmp_path / name, 4)
        write_images(tmp_path / name / "@eaDir" / "000.jpg", 1)
        write_images(tmp_path / name / ".thumbnails", 2)
        write_images(tmp_path / name / "deeper" / "__MACOSX", 1)
        (tmp_path / name / "._000.jpg").write_bytes(b"AppleDouble")
        (tmp_path / name / "phone.heics").touch()
    for name in ("@eaDir", "__MACOSX", "lost+found", ".cache"):
        write_images(tmp_path / name, 1)
    train, validation = splits(DataConfig(source=f"folder:{tmp_path}"))
    assert train.class_names == ("cat", "dog")
    assert sorted(ids(train) + ids(validation)) == sorted(map(str, tmp_path.glob("[cd]*/[0-9]*.jpg")))
    assert train.skipped == {"hidden": 4, "@eaDir/": 2, "__MACOSX/": 2, ".heics": 2}
    assert describe_skipped(train) == (
        "passed over 10 other files: 4 hidden, 2 .heics, 2 @eaDir/, 2 __MACOSX/ (HEIC photos can be read if "
        "pillow-heif is installed, the extra heif)"
    )


def test_symbolic_links_that_form_a_loop_end(tmp_path):
    for name in ("cat", "dog"):
        write_images(tmp_path / name, 2)
    (tmp_path / "cat" / "all").symlink_to(tmp_path)
    (tmp_path / "cat" / "itself").symlink_to(tmp_path / "cat")
    elsewhere = tmp_path.with_name(f"{tmp_path.name} elsewhere")
    write_images(elsewhere, 1)  # a link to another folder is followed, and its link back is not
    (tmp_path / "dog" / "more").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(tmp_path / "dog")
    for link in (tmp_path / "loop", tmp_path / "cat" / "loop.txt"):
        link.symlink_to(link)
    train, validation = splits(DataConfig(source=f"folder:{tmp_path}"))
    assert len(train) + len(validation) == 5
    assert train.skipped == {"links to a folder that is read already": 3, ".txt": 1}


@pytest.fixture
def deep_folder(tmp_path):
    """Folders in folders, more than Python has frames, and an image file in the innermost."""
    top = tmp_path / "deep"
    top.mkdir()
    folder = os.open(top, os.O_RDONLY)
    for _ in range(1050):
        os.mkdir("a", dir_fd=folder)
        outer, folder = folder, os.open("a", os.O_RDONLY, dir_fd=folder)
        os.close(outer)
    os.close(os.open("deep.jpg", os.O_CREAT, dir_fd=folder))
    os.close(folder)
    yield top
    subprocess.run(["rm", "-r", top], check=True)  # pytest cannot


def test_folders_of_any_depth_and_links_of_any_number_are_read_once(tmp_path, deep_folder):
    root, elsewhere = tmp_path / "classes", tmp_path / "elsewhere"
    for name in ("cat", "dog"):
        write_images(root / name, 2)
    (root / "cat" / "deep").symlink_to(deep_folder)
    for level in range(40):  # 2**40 paths lead to the last folder
        write_images(elsewhere / f"{level}", 1)
        for link in "ab":
            (elsewhere / f"{level}" / link).symlink_to(elsewhere / f"{level + 1}")
    (root / "dog" / "links").symlink_to(elsewhere / "0")
    train, validation = splits(DataConfig(source=f"folder:{root}"))
    assert len(train) + len(validation) == 4 + 1 + 40
    assert train.skipped["links to a folder that is read already"] == 39
    assert [path.name for path in files_below(deep_folder)] == ["deep.jpg"]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("names.txt", "dog\nbird\ncat\n"),
        ("names.txt", "\ufeffdog\r\nbird\r\ncat"),
        ("names.json", '{"cat": 2, "dog": 0, "bird": 1}'),
    ],
)
def test_a_class_map_gives_the_labels_of_any_source(tmp_path, file, text):
    for name in ("cat", "dog"):
        write_images(tmp_path / "images" / name, 2)
    class_map = tmp_path / file
    class_map.write_bytes(text.encode())
    source = open_source(DataConfig(source=f"folder:{tmp_path / 'images'}", class_map=class_map), "train")
    assert source.class_names == ("dog", "bird", "cat")
    assert {Path(example["id"]).parent.name: example["label"] for example in source.__getitems__([0, 1])} == {
        "cat": 2,
        "dog": 0,
    }
    class_map = tmp_path / "digits.txt"
    class_map.write_text("\n".join("9876543210"))
    plain = open_source(DIGITS, "train")
    turned = open_source(dataclasses.replace(DIGITS, class_map=class_map), "train")
    np.testing.assert_array_equal(turned.labels, 9 - plain.labels)
    assert turned.digest != plain.digest


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("names.txt", "cat\nbird", r"does not name these classes of folder:.*: dog\. Expected a text file with one"),
        ("names.txt", "cat\ndog\ncat", "has cat more than once"),
        ("names.json", '{"cat": 0, "dog": 2}', "its labels are not 0 to 1, each of them once"),
        ("names.json", '["cat", "dog"]', "it is not an object whose values are whole numbers"),
        ("names.json", '{"cat": 0, "dog"', "cannot be read"),
        ("missing.txt", None, "cannot be read: No such file"),
    ],
)
def test_a_class_map_that_does_not_fit_is_refused(tmp_path, file, text, message):
    for name in ("cat", "dog"):
        write_images(tmp_path / "images" / name, 2)
    if text is not None:
        (tmp_path / file).write_text(text)
    with pytest.raises(SourceError, match=message):
        open_source(DataConfig(source=f"folder:{tmp_path / 'images'}", class_map=tmp_path / file), "train")


def test_a_recipe_without_data_asks_for_the_flag():
    with pytest.raises(SourceError, match=r"No images were given\. Expected --data\.source folder:PATH"):
        open_source(RECIPES["finetune"].config.data, "train")


@pytest.mark.parametrize("source", ["folder:https://example.org/data", "https://example.org/data"])
def test_a_url_as_data_source_keeps_its_slashes_and_gets_a_hint(source):
    with pytest.raises(ValueError, match=rf"source='{source}': expected .*mount a bucket"):
        DataConfig(source=source)


def test_class_folders_alone_are_split_without_overlap(tmp_path):
    for name in ("cat", "dög"):
        write_images(tmp_path / name, 10)
    train, validation = splits(DataConfig(source=f"folder:{tmp_path}", held_out=0.2))
    assert np.bincount(train.labels).tolist() == [8, 8]
    assert np.bincount(validation.labels).tolist() == [2, 2]
    assert sorted(ids(train) + ids(validation)) == sorted(map(str, tmp_path.glob("*/*.jpg")))


def test_names_that_are_not_utf8_are_read_and_printed_in_ascii(tmp_path):
    odd = os.fsdecode(b"caf\xe9")
    for name in ("ant", odd):
        write_images(tmp_path / name, 10)
        (tmp_path / name / "003.jpg").rename(tmp_path / name / f"{odd}.jpg")
    train, validation = splits(DataConfig(source=f"folder:{tmp_path}", held_out=0.4))
    assert train.class_names == validation.class_names == ("ant", r"caf\xe9")
    assert (len(train), len(validation)) == (12, 8)
    found = ids(train) + ids(validation)
    assert str(tmp_path / "ant" / r"caf\xe9.jpg") in found
    assert "".join(found).isascii()
    images = [source[index]["image"] for source in (train, validation) for index in range(len(source))]
    assert sorted(images) == sorted(path.read_bytes() for path in tmp_path.glob("*/*.jpg"))


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: None, "holds no folder. Expected one per class"),
        (lambda root: (root / "cat").mkdir(), r"no image in cat\. .* \.jpg, \.png or one of \d+ others"),
        (lambda root: write_images(root / "validation" / "cat", 1), "has validation/ but no train/"),
        (
            lambda root: [write_images(root / name / "cat", 1) for name in ("Train", "Val")],
            "Train, Val look like splits but would be read as classes",
        ),
        (
            lambda root: [write_images(root / name / "cat", 2) for name in ("train", "Validation")],
            "Validation beside train/ would not be read",
        ),
        (
            lambda root: [write_images(root / "train" / "cat", 2), write_images(root / "val" / "dog", 1)],
            "has classes that training does not have: dog",
        ),
    ],
)
def test_folders_that_are_not_as_expected_are_refused(tmp_path, prepare, message):
    prepare(tmp_path)
    with pytest.raises(SourceError, match=message):
        splits(DataConfig(source=f"folder:{tmp_path}"))


def test_means_and_deviations_of_0_to_255_are_refused():
    """They would make every image almost constant, without an error."""
    with pytest.raises(ValueError, match=r"(?s)image_mean=.*divide statistics .* by 255.*image_std=.*up to 1"):
        DataConfig(source="synthetic", image_mean=(123.7, 116.3, 103.5), image_std=(58.4, 57.1, 57.4))


@pytest.mark.parametrize("name", ["train", "val", "valid", "validation"])
@pytest.mark.parametrize("kinds", [("steam", "diesel"), ("",)], ids=["with folders", "without folders"])
def test_a_class_named_like_a_split_does_not_hide_the_others(tmp_path, name, kinds):
    for folder in ("bus", "car", *(f"{name}/{kind}" for kind in kinds)):
        write_images(tmp_path / folder, 2)
    with pytest.raises(SourceError, match=rf"ambiguous: {name}/ is read as a split, so that bus, car beside"):
        splits(DataConfig(source=f"folder:{tmp_path}"))
    (tmp_path / "new" / "train").mkdir(parents=True)
    for folder in ("bus", "car", name):
        (tmp_path / folder).rename(tmp_path / "new" / "train" / folder)
    train, _ = splits(DataConfig(source=f"folder:{tmp_path / 'new'}"))  # as the message says
    assert train.class_names == tuple(sorted(("bus", "car", name)))


def test_other_folders_may_lie_beside_splits(tmp_path):
    """Other splits, runs with their example images, notes, and hidden folders."""
    for folder in ("train/cat", "train/dog", "val/cat", "val/dog", "test/cat", "hard/cat", "hard/dog", ".cache"):
        write_images(tmp_path / folder, 2)
    write_images(tmp_path / "runs" / "finetune" / "examples", 1, "png")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "licence.txt").touch()
    assert [len(source) for source in splits(DataConfig(source=f"folder:{tmp_path}"))] == [4, 4]
    assert len(open_source(DataConfig(source=f"folder:{tmp_path}"), "hard")) == 4


def test_a_split_that_is_empty_is_refused_with_the_flags_of_either_split(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "alone.png")
    with pytest.raises(SourceError, match=r"'validation' of folder:.* is empty.*--data\.evaluation-split.*add images"):
        open_source(DataConfig(source=f"folder:{tmp_path}"), "validation")


def test_splits_and_folders_that_do_not_exist_are_named(tmp_path):
    write_images(tmp_path / "train" / "cat", 2)
    with pytest.raises(SourceError, match=r"has no split 'test': .* holds train"):
        open_source(DataConfig(source=f"folder:{tmp_path}"), "test")
    with pytest.raises(SourceError, match="there is no folder"):
        open_source(DataConfig(source=f"folder:{tmp_path}/nowhere"), "train")


def test_every_field_of_a_config_that_is_out_of_range_is_named():
    with pytest.raises(ValueError, match=r"(?s)DataConfig cannot work.*source='folder:'.*batch_size=0.*seed=-1"):
        DataConfig(source="folder:", batch_size=0, seed=-1)
    with pytest.raises(ValueError, match=r"crop_scale=\(0.5, 0.1\): expected 0 < smallest <= largest <= 1"):
        dataclasses.replace(DataConfig().augment, crop_scale=(0.5, 0.1))
    with pytest.raises(ValueError, match="'x3' is unknown"):
        dataclasses.replace(DataConfig().augment, randaugment="rand-x3")
    with pytest.raises(ValueError, match="mix_group=3: expected 0 or an even number"):
        dataclasses.replace(DataConfig().mix, mix_group=3)

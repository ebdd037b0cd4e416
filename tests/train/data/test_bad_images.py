"""An unreadable image stops a run and is named, or is skipped and reported."""

import dataclasses
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from poolformer_jax.images import ImageError
from refusals import at_most
from small_data import SMALL, assert_same, photographs, take, write_photographs
from train.data import HostAugmentation, SourceError, open_source
from train.data.make_batch import BadImageError
from train.data.pipeline import evaluation_batches, train_batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture
def damaged(tmp_path, folder):
    """The same photographs, one of them cut off in the middle."""
    root = tmp_path / "damaged"
    for path in folder.glob("*/*.jpg"):
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        (root / path.parent.name / path.name).write_bytes(path.read_bytes())
    bad = root / "class 0" / "06.jpg"
    bad.write_bytes(bad.read_bytes()[:2000])
    return root, bad


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_stops_training_and_is_named(damaged, workers):
    root, bad = damaged
    config = photographs(root, workers=workers)
    with pytest.raises(BadImageError, match=rf"The image {bad} cannot be read: .*\n.*--data.on-bad-image skip"):
        take(config, open_source(config, "train"), 5)


def _nothing(path):
    """Makes something that has the name of an image and is none; it must not end a run, take its memory or block it."""
    kind = path.stem
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(8 << 30)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(str(path))
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "folder":  # becomes one after the folder was read
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("kind", ["pipe", "device", "sparse", "socket", "loop", "folder"])
def test_what_is_no_file_among_images_is_named_or_skipped(tmp_path, folder, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    root = Path("photos")
    shutil.copytree(folder, root)
    place = root / "class 0" / f"{kind}.jpg"
    if kind == "folder":
        place.touch()
        source = open_source(photographs(root), "train")
    _nothing(place)
    if kind != "folder":
        source = open_source(photographs(root), "train")
    index = next(row for row in range(len(source)) if source.names[row].item().endswith(place.name.encode()))
    with at_most(1 << 22):
        assert isinstance(source[index]["image"], ImageError)
    config = photographs(root, on_bad_image="skip")
    with train_batches(config, source) as batches:
        for _ in range(2 * len(source) // config.batch_size):
            next(batches)
        (bad,) = batches.bad_images
    assert bad.endswith(f"{kind}.jpg")
    with pytest.raises(BadImageError, match=rf"{kind}\.jpg cannot be read"):
        take(photographs(root), source, 2 * len(source) // config.batch_size)


def test_a_damaged_image_can_be_skipped_and_is_counted(damaged, folder, caplog):
    root, bad = damaged
    config = photographs(root, on_bad_image="skip")
    source = open_source(config, "train")
    whole = take(photographs(folder), open_source(photographs(folder), "train"), 8)
    batches = train_batches(config, source)
    taken = [next(batches) for _ in range(8)]
    batches.close()
    assert list(batches.bad_images) == [str(bad)]
    assert "truncated" in batches.bad_images[str(bad)]
    assert len([record for record in caplog.records if str(bad) in record.getMessage()]) == 1
    lost = next(index for index in range(len(source)) if source[index]["id"] == str(bad))
    for batch, expected in zip(taken, whole):
        wanted = np.where(expected["index"] == lost, lost + 1, expected["index"])  # the next one stands in
        np.testing.assert_array_equal(batch["index"], wanted)
        same = expected["index"] != lost
        np.testing.assert_array_equal(batch["image"][same], expected["image"][same])
    assert_same(take(config, source, 2, start_step=5), taken[5:7])
    parts = [take(config, source, 8, process_index=p, process_count=2) for p in range(2)]
    assert_same([{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*parts)], taken)


def test_a_damaged_image_is_left_out_of_an_evaluation_that_skips(damaged):
    root, bad = damaged
    config = photographs(root, on_bad_image="skip", held_out=0.9)
    source = open_source(config, "validation")
    assert str(bad) in [source[index]["id"] for index in range(len(source))]
    with evaluation_batches(config, source) as batches:
        counted = sum(int(batch["mask"].sum()) for batch in batches)
        assert counted == len(source) - 1
        assert list(batches.bad_images) == [str(bad)]
    with pytest.raises(BadImageError), evaluation_batches(photographs(root, held_out=0.9), source) as batches:
        list(batches)


@pytest.fixture
def dangling(damaged):
    """The same photographs, one of them a link to a file that is not there."""
    root, bad = damaged
    bad.unlink()
    bad.symlink_to(root / "nowhere.jpg")
    return root, bad


def test_a_file_that_cannot_be_opened_is_a_bad_image(dangling):
    root, bad = dangling
    with pytest.raises(BadImageError, match=rf"The image {bad} cannot be read: its file cannot be read: No such file"):
        take(photographs(root), open_source(photographs(root), "train"), 5)
    config = photographs(root, on_bad_image="skip", held_out=0.9)
    for split, batches in (("train", train_batches), ("validation", evaluation_batches)):
        source = open_source(photographs(root, held_out=0.9 if split == "validation" else 0.2), split)
        with batches(config, source) as running:
            for _ in range(5):
                next(running)
            assert running.bad_images == {str(bad): "its file cannot be read: No such file or directory"}


@pytest.mark.parametrize("leave", ["nothing", "the folder"], ids=str)
def test_a_missing_data_folder_is_not_a_bad_image(damaged, leave):
    root, _ = damaged
    config = photographs(root, on_bad_image="skip")
    source = open_source(config, "validation")
    shutil.rmtree(root)
    if leave == "the folder":
        root.mkdir()  # as where a file system was unmounted
    with (
        pytest.raises(SourceError, match=f"The folder {root} no longer exists or is empty"),
        evaluation_batches(config, source) as batches,
    ):
        list(batches)


def test_the_reason_for_a_bad_image_depends_on_the_settings_of_the_run(damaged):
    root, bad = damaged
    Image.new("RGB", (800, 1)).save(bad)  # whose edge of 1 would become 448 / 0.9 = 497: too many pixels, not for 224
    config = photographs(root, on_bad_image="skip", held_out=0.9, image_size=448)
    with evaluation_batches(config, open_source(config, "validation")) as batches:
        list(batches)
        assert "too long and thin" in batches.bad_images[str(bad)]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_files_in_no_known_format_are_described_in_words(damaged, split):
    root, bad = damaged
    bad.write_bytes(b"no image")
    config = photographs(root, held_out=0.9 if split == "validation" else 0.2)
    batches = train_batches if split == "train" else evaluation_batches
    with pytest.raises(BadImageError) as caught, batches(config, open_source(config, split)) as running:
        for _ in range(5):
            next(running)
    assert f"{bad} cannot be read" in str(caught.value)
    assert "its format is not JPEG" in str(caught.value)
    assert "object at 0x" not in str(caught.value)


class NothingReadable:
    """A data set of which no image can be read."""

    class_names = ("only",)

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"image": b"no image", "label": 0, "id": f"number {index}"}

    def __getitems__(self, indices):
        return [self[index] for index in indices]


def test_skipping_ends_if_no_image_can_be_read():
    config = dataclasses.replace(SMALL, on_bad_image="skip", crop_pct=None)
    with pytest.raises(BadImageError, match="3 images in a row cannot be read"):
        take(config, NothingReadable(), 1)


def test_transforms_raise_image_errors(folder):
    """Otherwise a damaged image would end a run with a traceback from Pillow."""
    from train.data import TrainingTransform

    for augment in (HostAugmentation(), HostAugmentation(crop="evaluation")):
        transform = TrainingTransform(photographs(folder, augment=augment))
        with pytest.raises(ImageError):
            transform(b"no image", np.random.default_rng(0))

"""Packing a folder: TFDS reads the same files back, and bad files are named."""

import dataclasses
import os
import resource
import sys
from pathlib import Path

import pytest

from faults import Disk
from packing import examples_of, jpeg, write_archives, write_folder
from poolformer_jax.errors import InputError
from train.command_line import main
from train.data import (
    DataConfig,
    PrepareConfig,
    SourceError,
    evaluation_batches,
    open_source,
    prepare_data,
    train_batches,
)
from train.data.shards import Progress


def test_what_tfds_reads_back_are_the_files_themselves(tmp_path):
    config = write_folder(tmp_path)
    prepared = prepare_data(config)
    assert prepared.folder == tmp_path / "packed" / "photos" / "1.0.0"
    assert prepared.images == {"train": 54, "validation": 6}
    for split in ("train", "validation"):
        packed = open_source(DataConfig(source=f"tfds:{prepared.folder}"), split)
        files = open_source(DataConfig(source=config.source), split)
        assert packed.class_names == files.class_names == ("class 0", "class 1", "class 2")
        found = examples_of(packed)
        assert len(found) == len(packed) == len(files)
        for index in range(len(files)):
            wanted = files[index]
            name = str(Path(wanted["id"]).relative_to(tmp_path / "photos"))
            assert (found[name]["image"], found[name]["label"]) == (wanted["image"], wanted["label"])


@pytest.mark.skipif(sys.platform != "linux", reason="finds the names of open files in /proc")
def test_a_loss_of_power_drops_nothing_of_a_packed_data_set(tmp_path, monkeypatch):
    config = write_folder(tmp_path, classes=2, images=3)
    disk = Disk(monkeypatch)
    prepare_data(config)
    assert config.folder in disk.renamed
    assert disk.synced[config.folder.parent.stat().st_ino] == ["1.0.0"]


def test_packed_data_sets_are_shuffled_into_shards(tmp_path):
    prepared = prepare_data(write_folder(tmp_path))
    assert len(list(prepared.folder.glob("*train*"))) == 7  # 54 images, 8 to a shard
    source = open_source(DataConfig(source=f"tfds:{prepared.folder}"), "train[:50%]")
    assert len(source) == 27
    assert {source[index]["label"] for index in range(len(source))} == {0, 1, 2}


def test_training_and_evaluation_read_packed_data_without_tensorflow(tmp_path):
    prepared = prepare_data(write_folder(tmp_path))
    config = DataConfig(source="tfds:photos", data_dir=tmp_path / "packed", image_size=32, batch_size=6, workers=1)
    source = open_source(config, "train")
    with train_batches(config, source) as batches:
        batch = next(batches)
    for label, index in zip(batch["label"], batch["index"]):
        assert source[int(index)]["label"] == label
    with evaluation_batches(config, open_source(config, "validation")) as batches:
        assert sum(int(batch["mask"].sum()) for batch in batches) == prepared.images["validation"]
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json", "shard"])
def test_a_damaged_data_set_is_named(tmp_path, name):
    folder = prepare_data(write_folder(tmp_path, classes=2, images=3)).folder
    path = next(folder.glob("*train*")) if name == "shard" else folder / name
    path.write_bytes(path.read_bytes()[:-60] if name != "shard" else bytes(len(path.read_bytes())))
    with pytest.raises(SourceError, match=rf"tfds:{folder} cannot be read"):
        open_source(DataConfig(source=f"tfds:{folder}"), "train")[0]


def test_other_names_than_classes_are_refused(tmp_path):
    folder = prepare_data(write_folder(tmp_path, classes=2, images=3)).folder
    (folder / "label.labels.txt").write_text("class 0\n")
    with pytest.raises(SourceError, match="has 1 different names for its 2 classes"):
        open_source(DataConfig(source=f"tfds:{folder}"), "train")


def test_a_data_set_imports_no_module_that_its_features_name(tmp_path, monkeypatch):
    folder = prepare_data(write_folder(tmp_path, classes=2, images=3)).folder
    (tmp_path / "harmful.py").write_text("raise SystemExit('this was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    features = folder / "features.json"
    features.write_text(features.read_text().replace("tensorflow_datasets.core.features.text_feature.", "harmful."))
    with pytest.raises(SourceError, match=r"names 'harmful\.Text', which is not a class of TFDS"):
        open_source(DataConfig(source=f"tfds:{folder}"), "train")


def test_a_full_disk_is_named_and_the_same_command_goes_on(tmp_path):
    config = write_folder(tmp_path, classes=2, images=3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"Cannot write .*: .*File too large.*run the command again"):
            prepare_data(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.rglob("*.tmp"))
    assert sum(prepare_data(config).images.values()) == 6


def test_a_pipe_in_place_of_a_shard_is_refused(tmp_path):
    folder = prepare_data(write_folder(tmp_path, classes=2, images=3)).folder
    shard = next(folder.glob("*train*"))
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(InputError, match=rf"{shard} is not a file, but .* a pipe"):
        open_source(DataConfig(source=f"tfds:{folder}"), "train")


def test_files_that_are_not_images_are_all_named_and_nothing_is_finished(tmp_path):
    config = write_folder(tmp_path)
    bad = [tmp_path / "photos" / "class 1" / name for name in ("3.jpg", "17.jpg")]
    for path in bad:
        path.write_bytes(b"no image")
    with pytest.raises(SourceError) as caught:
        prepare_data(config)
    assert all(str(path) in str(caught.value) for path in bad)
    assert "2 files cannot be read as images" in str(caught.value)
    assert not config.folder.exists()
    with pytest.raises(SourceError, match="no prepared data set is there"):
        open_source(DataConfig(source=f"tfds:{config.folder}"), "train")
    for path in bad:
        path.write_bytes(jpeg(99))
    assert prepare_data(config).images == {"train": 54, "validation": 6}


def test_a_truncated_jpeg_is_found_when_it_is_packed(tmp_path):
    """Its header is whole, and evaluation would stop at it."""
    config = write_folder(tmp_path)
    bad = tmp_path / "photos" / "class 2" / "11.jpg"
    bad.write_bytes(bad.read_bytes()[:-100])
    with pytest.raises(SourceError, match=rf"(?s)1 file cannot be read as images:\n  {bad}: .*truncated"):
        prepare_data(config)
    prepared = prepare_data(dataclasses.replace(config, on_bad_image="skip"))
    assert [name.split(": ")[0] for name in prepared.left_out] == [str(bad)]


def test_packing_counts_the_files_that_are_passed_over_and_says_what_was_packed_before(tmp_path, capsys):
    config = write_folder(tmp_path)
    (tmp_path / "photos" / "class 0" / "notes.txt").touch()
    command = ["prepare", config.source, str(config.output)]
    for was_packed in (False, True):
        assert main(command) == 0
        printed = capsys.readouterr().out.splitlines()
        assert "passed over 1 other file: 1 .txt" in printed
        assert ("already packed; nothing was written" in printed) == was_packed


def test_listing_reports_progress_after_every_class(tmp_path):
    def listed(config):
        seen: list[Progress] = []
        prepare_data(config, seen.append)
        return [progress.images for progress in seen if progress.total_images is None]

    pool = write_folder(tmp_path / "pool")
    assert listed(pool) == [20, 40, 60], "a pool is listed once for both splits"
    divided = dataclasses.replace(write_folder(tmp_path / "divided"), source=f"folder:{tmp_path / 'divided'}")
    (tmp_path / "divided" / "photos").rename(tmp_path / "divided" / "train")
    for name in ("class 0", "class 2"):
        (tmp_path / "divided" / "validation" / name).mkdir(parents=True)
        (tmp_path / "divided" / "validation" / name / "0.jpg").write_bytes(jpeg(7))
    assert listed(dataclasses.replace(divided, name="divided")) == [20, 40, 60, 61, 62]
    assert listed(write_archives(tmp_path / "archives")) == [4, 8, 12, 17]


def test_names_that_are_not_utf8_are_written_in_ascii(tmp_path):
    config = write_folder(tmp_path)
    odd = os.fsdecode(b"caf\xe9")
    (config.path / "class 1" / "3.jpg").rename(config.path / "class 1" / f"{odd}.jpg")
    (config.path / "class 2").rename(config.path / odd)
    packed = [open_source(DataConfig(source=f"tfds:{prepare_data(config).folder}"), s) for s in ("train", "validation")]
    assert packed[0].class_names == (r"caf\xe9", "class 0", "class 1")
    found = {**examples_of(packed[0]), **examples_of(packed[1])}
    assert len(found) == 60
    assert found[r"class 1/caf\xe9.jpg"]["image"] == jpeg([1, 3])


def test_an_empty_split_is_refused_before_anything_is_made(tmp_path):
    alone = write_folder(tmp_path / "alone", images=1)
    undivided = write_folder(tmp_path / "divided", images=2)
    divided = dataclasses.replace(undivided, source=f"folder:{tmp_path / 'divided'}", name="divided")
    (tmp_path / "divided" / "photos").rename(tmp_path / "divided" / "train")
    (tmp_path / "divided" / "validation" / "class 1").mkdir(parents=True)
    for config in (alone, divided):
        with pytest.raises(SourceError, match=r"'validation' of folder:.* is empty\. Add images"):
            prepare_data(config)
        assert not config.output.exists()


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    config = write_folder(tmp_path)
    (config.path / "class 1" / "3.jpg").unlink()
    (config.path / "class 1" / "3.jpg").symlink_to("nowhere")
    with pytest.raises(SourceError, match=r"(?s)1 file cannot be read as images:.*3\.jpg: its file cannot be read"):
        prepare_data(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "tfds:x"}, "expected folder:PATH, labels:FILE, parquet:PATH or imagenet:PATH"),
        ({"name": "My Photos"}, "expected a lower-case letter, then letters, digits and _"),
        ({"images_per_shard": 0}, "images_per_shard=0: expected a positive number"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**{"source": f"folder:{tmp_path}", "output": tmp_path, **changes})


def test_names_of_data_sets_come_from_the_folder(tmp_path):
    assert PrepareConfig(f"folder:{tmp_path}/Cats & Dogs/", tmp_path).dataset_name == "cats_dogs"
    assert PrepareConfig(f"folder:{tmp_path}/102flowers", tmp_path).dataset_name == "images_102flowers"
    assert PrepareConfig(f"imagenet:{tmp_path}", tmp_path).dataset_name == "ilsvrc2012"

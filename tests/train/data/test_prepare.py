"""Packing data sets: TFDS reads the same files back, and an interruption loses nothing."""

import dataclasses
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc  # noqa: F401 - pytest may import it while TFDS replaces Python's import, which fails
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from faults import Disk
from paths import ROOT
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


def jpeg(seed):
    """A small JPEG that is different for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((40, 48)).save(file, "JPEG")
    return file.getvalue()


def write_folder(root, classes=3, images=20):
    for label in range(classes):
        for number in range(images):
            path = root / "photos" / f"class {label}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg([label, number]))
    return PrepareConfig(source=f"folder:{root / 'photos'}", output=root / "packed", images_per_shard=8, threads=2)


def examples_of(source):
    return {source[index]["id"].split(" ", 1)[1]: source[index] for index in range(len(source))}


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


def interrupt(config, shards, folder):
    """Starts packing and interrupts it after `shards` shards."""

    def stop(progress):
        if progress.total_images and len(list(folder.glob("*array_record-*"))) >= shards:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_data(config, stop)


def with_files_that_are_not_images(root):
    config = dataclasses.replace(write_folder(root), threads=1, images_per_shard=4)
    bad = sorted(root / "photos" / f"class {label}" / f"{number}.jpg" for label in range(3) for number in (3, 9, 15))
    for path in bad:
        path.write_bytes(b"no image")
    return config, [str(path) for path in bad]


def test_an_interrupted_run_keeps_the_list_of_left_out_files(tmp_path):
    config, bad = with_files_that_are_not_images(tmp_path)
    skipping = dataclasses.replace(config, on_bad_image="skip")
    interrupt(skipping, 8, config.folder.with_name("1.0.0.incomplete"))
    prepared = prepare_data(skipping)
    assert [name.split(": ")[0] for name in prepared.left_out] == bad
    assert sum(prepared.images.values()) == 60 - len(bad)
    assert prepare_data(skipping) == prepared._replace(was_packed=True)


def test_shards_that_leave_out_files_do_not_count_as_complete(tmp_path):
    config, bad = with_files_that_are_not_images(tmp_path)
    skipping = dataclasses.replace(config, on_bad_image="skip")
    work = config.folder.with_name("1.0.0.incomplete")
    interrupt(skipping, 8, work)
    with pytest.raises(SourceError, match=r"was packed with --on-bad-image skip and leaves out \d files") as caught:
        prepare_data(config)
    noted = [name for name in bad if name in str(caught.value)]
    assert 0 < len(noted) < len(bad), "those of the finished shards"
    assert f"{work} was packed" in str(caught.value)
    assert "replace them and remove that folder" in str(caught.value)
    prepare_data(skipping)
    with pytest.raises(SourceError, match=rf"{config.folder} was packed .* leaves out {len(bad)} files"):
        prepare_data(config)


def test_a_complete_shard_removes_the_list_of_an_interrupted_one(tmp_path):
    """The run was killed between the list and the shard; then the files are replaced."""
    config, bad = with_files_that_are_not_images(tmp_path)
    prepared = prepare_data(dataclasses.replace(config, on_bad_image="skip"))
    work = config.folder.with_name("1.0.0.incomplete")
    prepared.folder.rename(work)
    (work / "dataset_info.json").unlink()
    for path in work.glob("*array_record-*"):
        path.unlink()
    for number, path in enumerate(bad):
        Path(path).write_bytes(jpeg([99, number]))
    assert prepare_data(config).left_out == []
    assert sum(prepare_data(config).images.values()) == 60


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


PROGRAM = """
import sys
from pathlib import Path
from train.data import PrepareConfig, prepare_data
config = PrepareConfig(source=sys.argv[1], output=Path(sys.argv[2]), images_per_shard=4, threads=2)
prepare_data(config, lambda progress: progress.total_images and print(progress.images, flush=True))
"""


@pytest.mark.slow
def test_a_run_killed_at_any_moment_continues_and_packs_the_same_data(tmp_path):
    config = write_folder(tmp_path, classes=4, images=50)
    command = [sys.executable, "-c", PROGRAM, config.source, str(config.output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    work = config.folder.with_name("1.0.0.incomplete")
    started = []
    for shards in (3, 10, 20):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as program:
            started.append(int(program.stdout.readline()))
            while len(list(work.glob("*array_record-*"))) < shards and program.poll() is None:
                time.sleep(0.001)
            program.send_signal(signal.SIGKILL)
        assert program.returncode == -signal.SIGKILL
        assert not config.folder.exists()
    assert started[0] == 0 < started[1] < started[2]
    kept = {path.name: path.stat().st_mtime_ns for path in work.glob("photos-*")}
    seen: list[Progress] = []
    prepared = prepare_data(PrepareConfig(config.source, config.output, images_per_shard=4, threads=2), seen.append)
    seen = [progress for progress in seen if progress.total_images is not None]
    assert seen[0].images >= started[2]
    assert seen[-1] == Progress(200, 200)
    assert kept == {name: (prepared.folder / name).stat().st_mtime_ns for name in kept}
    fresh = prepare_data(PrepareConfig(config.source, tmp_path / "fresh", images_per_shard=4, threads=2))
    for split in ("train", "validation"):
        resumed, once = (open_source(DataConfig(source=f"tfds:{one.folder}"), split) for one in (prepared, fresh))
        assert [resumed[index] for index in range(len(resumed))] == [once[index] for index in range(len(once))]
    assert sorted(path.name for path in prepared.folder.iterdir()) == sorted(
        path.name for path in fresh.folder.iterdir()
    )


def test_shards_of_other_files_are_not_mixed_in(tmp_path):
    config = write_folder(tmp_path)
    (tmp_path / "photos" / "class 1" / "3.jpg").write_bytes(b"no image")
    with pytest.raises(SourceError, match="1 file cannot be read as images"):
        prepare_data(config)
    (tmp_path / "photos" / "class 1" / "3.jpg").unlink()
    with pytest.raises(SourceError, match=r"1\.0\.0\.incomplete was packed from other files"):
        prepare_data(config)


def test_a_finished_data_set_is_left_alone(tmp_path):
    config = write_folder(tmp_path)
    first = prepare_data(config)
    before = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    assert prepare_data(config) == first._replace(was_packed=True)
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == before


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


def test_a_data_set_is_packed_by_one_run_at_a_time(tmp_path):
    config = write_folder(tmp_path)
    refusals = []

    def begin_another(progress):
        if progress.total_images is None:  # nothing is written yet
            return
        with pytest.raises(ValueError, match=r"Another run is packing .*photos/1\.0\.0\. Expected one") as refusal:
            prepare_data(config)
        refusals.append(refusal)

    prepared = prepare_data(config, begin_another)
    assert len(refusals) == 9  # once with nothing done, then after each of 7 + 1 shards
    packed = open_source(DataConfig(source=f"tfds:{prepared.folder}"), "train")
    for example in examples_of(packed).values():
        assert Image.open(io.BytesIO(example["image"])).size == (40, 48)
    assert prepare_data(config) == prepared._replace(was_packed=True), "the lock is released"


def replace_one(config):
    path = config.path / "class 1" / "3.jpg"
    path.write_bytes(path.read_bytes() + b"\0")
    return config


@pytest.mark.parametrize(
    ("change", "different"),
    [
        (replace_one, "files: .* differ from"),
        (
            lambda config: (config.path / "class 1" / "3.jpg").unlink() or config,
            "files: .* differ from",
        ),
        (lambda config: dataclasses.replace(config, held_out=0.2), "files: .*splits differ from"),
        (
            lambda config: dataclasses.replace(config, images_per_shard=9),
            "images_per_shard: packed with 8, now 9",
        ),
    ],
    ids=["a changed file", "a removed file", "held out", "images per shard"],
)
def test_a_finished_data_set_of_other_files_or_settings_is_refused(tmp_path, change, different):
    config = write_folder(tmp_path)
    prepare_data(config)
    before = {path: path.read_bytes() for path in config.folder.iterdir()}
    with pytest.raises(SourceError, match=rf"(?s)was packed from other files.*{different}.*--output or --name"):
        prepare_data(change(config))
    assert {path: path.read_bytes() for path in config.folder.iterdir()} == before


def test_a_finished_data_set_without_a_fingerprint_is_refused(tmp_path):
    config = write_folder(tmp_path)
    (prepare_data(config).folder / "fingerprint.json").unlink()
    with pytest.raises(SourceError, match=r"without a fingerprint.*--data.source tfds:"):
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


# ILSVRC2012 in small: three classes, two of which have the same name, and one group of classes.
SYNSETS = [(1, "n03126707", "crane", 0), (2, "n01440764", "tench, Tinca tinca", 0), (3, "n02012849", "crane", 0)]
GROUP = (4, "n00015388", "animal", 3)
VALIDATION = [2, 3, 1, 1, 2]


def add(archive, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def write_archives(root):
    root.mkdir()
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for number, name, _, _ in SYNSETS:
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w") as inner:
                for image in range(4):
                    add(inner, f"{name}_{image}.JPEG", jpeg([number, image]))
            add(outer, f"{name}.tar", file.getvalue())
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as archive:
        for image in reversed(range(len(VALIDATION))):
            add(archive, f"ILSVRC2012_val_{image + 1:08d}.JPEG", jpeg([100, image]))
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": np.array([*SYNSETS, GROUP], dtype=kinds)})
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        add(archive, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        truth = "".join(f"{number}\n" for number in VALIDATION)
        add(archive, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())
    return PrepareConfig(source=f"imagenet:{root}", output=root.parent / "packed", images_per_shard=5)


def test_imagenets_archives_are_packed_with_labels_in_the_order_of_wordnet_ids(tmp_path):
    prepared = prepare_data(write_archives(tmp_path / "archives"))
    assert prepared.images == {"train": 12, "validation": 5}
    train = open_source(DataConfig(source="tfds:ilsvrc2012", data_dir=tmp_path / "packed"), "train")
    assert train.class_names == ("tench, Tinca tinca", "crane (n02012849)", "crane (n03126707)")
    found = examples_of(train)
    label_of = {2: 0, 3: 1, 1: 2}  # from ILSVRC2012_ID
    for number, name, _, _ in SYNSETS:
        for image in range(4):
            example = found[f"{name}/{name}_{image}.JPEG"]
            assert (example["image"], example["label"]) == (jpeg([number, image]), label_of[number])
    validation = examples_of(open_source(DataConfig(source=f"tfds:{prepared.folder}"), "validation"))
    for image, number in enumerate(VALIDATION):
        example = validation[f"ILSVRC2012_val_{image + 1:08d}.JPEG"]
        assert (example["image"], example["label"]) == (jpeg([100, image]), label_of[number])


def test_missing_and_cut_off_archives_are_named(tmp_path):
    config = write_archives(tmp_path / "archives")
    train = tmp_path / "archives" / "ILSVRC2012_img_train.tar"
    whole = train.read_bytes()
    train.write_bytes(whole[: len(whole) // 2 + 700])
    with pytest.raises(SourceError, match=r"ILSVRC2012_img_train\.tar is damaged or cut off"):
        prepare_data(config)
    train.write_bytes(whole)
    kit = tmp_path / "archives" / "ILSVRC2012_devkit_t12.tar.gz"
    whole = kit.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no archive"):
        kit.write_bytes(damaged)
        with pytest.raises(SourceError, match=r"ILSVRC2012_devkit_t12\.tar\.gz is damaged or cut off"):
            prepare_data(config)
    os.truncate(kit, 8 << 30)
    with pytest.raises(InputError, match=r"ILSVRC2012_devkit_t12\.tar\.gz has 8,589,934,592 bytes, more than"):
        prepare_data(config)
    kit.write_bytes(whole)
    (tmp_path / "archives" / "ILSVRC2012_img_val.tar").unlink()
    with pytest.raises(SourceError, match=r"ILSVRC2012_img_val\.tar missing\. Expected the three archives"):
        prepare_data(config)
    assert not config.output.exists()

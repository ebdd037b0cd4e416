"""Packing the same folder again: after an interruption, beside another run, and after a change."""

import dataclasses
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from packing import examples_of, jpeg, write_folder
from paths import ROOT
from train.data import DataConfig, PrepareConfig, SourceError, open_source, prepare_data
from train.data.shards import Progress


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

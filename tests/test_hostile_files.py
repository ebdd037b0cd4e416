"""A pipe, a device, a loop of links and a file without end get one sentence, wherever a file is expected."""

import json
import os
import random
import tarfile
from functools import partial
from pathlib import Path

import pytest

from poolformer_jax.errors import PoolFormerError
from poolformer_jax.images import ImageError, read_image
from poolformer_jax.process import error_message
from poolformer_jax.weights import open_model
from refusals import OVERHEAD, at_most
from saved_models import PROCESSOR, save
from train.commands.imagenet_sets import read_real_labels, write_results_row
from train.config import read_recipe_file
from train.data.sources.archives import list_members
from train.data.sources.class_map import read_class_map
from train.data.sources.folders import open_folder
from train.data.sources.label_files import open_label_file
from train.data.sources.parquet import _batches as read_batches, open_parquet
from train.report.journal import MetricsFile, last_logged_step

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
COLUMNS = ("train", 0.1, None, "label", "single_label_classification")


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def make_sparse(path: Path, start: bytes = b"") -> None:
    path.write_bytes(start)
    os.truncate(path, 8 << 30)


KINDS = [make_pipe, link_to_device, link_to_itself, make_sparse]


def open_exported(path):
    from poolformer_jax.export.exported_file import open_exported  # imports jax

    return open_exported(path)


READERS = {
    "recipe.json": read_recipe_file,
    "labels.csv": lambda path: open_label_file(str(path), *COLUMNS),
    "labels.jsonl": lambda path: open_label_file(str(path), *COLUMNS),
    "train.parquet": lambda path: open_parquet(str(path.parent), *COLUMNS),
    "map.json": read_class_map,
    "map.txt": read_class_map,
    "real.json": read_real_labels,
    "results.csv": partial(write_results_row, model="m", top1=0, top5=0, parameters=0, processor=PROCESSOR),
    "images": lambda path: open_folder(path, "train", 0.1),
    "photo.png": read_image,
    "network.onnx": open_exported,
    "network.xml": open_exported,
    "network.stablehlo": open_exported,
}


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_of_a_possible_size_gets_one_sentence(tmp_path, name, make):
    if name == "train.parquet":
        pytest.importorskip("pyarrow")
    if name == "network.stablehlo":
        (tmp_path / "network.stablehlo.json").write_text("{}")
    make(tmp_path / name)
    if (name, make) == ("results.csv", link_to_itself):
        return  # the link is replaced by a new table
    with at_most(OVERHEAD), pytest.raises((PoolFormerError, OSError)) as error:
        READERS[name](tmp_path / name)
    message = error_message(error.value)
    assert name in message or "/dev/zero" in message


@pytest.mark.parametrize("make", KINDS)
def test_metrics_that_are_no_file_are_written_anew(tmp_path, make):
    make(tmp_path / "metrics.jsonl")
    with at_most(OVERHEAD):
        assert last_logged_step(tmp_path) is None
    with MetricsFile(tmp_path, 0):
        assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("make", KINDS)
def test_a_model_card_that_is_no_file_is_left_alone_when_the_model_is_saved(tmp_path, make):
    save(tmp_path)
    card = tmp_path / "README.md"
    card.unlink()
    make(card)
    before = os.lstat(card)
    save(tmp_path)
    if make is not link_to_itself:  # a link to nothing is replaced
        assert os.lstat(card).st_ino == before.st_ino


@pytest.mark.parametrize("make", [make_pipe, link_to_device, link_to_itself, Path.mkdir])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "flax_model.safetensors"])
def test_a_part_of_a_model_that_is_no_file_is_named_and_not_passed_over(tmp_path, name, make):
    save(tmp_path, image_processor=PROCESSOR)
    (tmp_path / name).unlink()
    make(tmp_path / name)
    with pytest.raises(PoolFormerError, match=f"{name} is not a file"):
        assert open_model(tmp_path).image_processor == PROCESSOR


@pytest.mark.parametrize("start", [b"RIFF\x24\0\0\0WEBPVP8 ", b"\0\0\0 ftypavif"])
def test_an_image_that_pillow_would_read_whole_is_refused_by_its_size(tmp_path, start):
    make_sparse(tmp_path / "photo", start)
    with at_most(OVERHEAD), pytest.raises(ImageError, match="has 8,589,934,592 bytes, more than"):
        read_image(tmp_path / "photo")


def test_a_table_of_more_rows_than_bytes_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = 200_000
    table = pyarrow.table({"image": pyarrow.repeat(pyarrow.scalar(b"x"), rows), "label": pyarrow.repeat(1, rows)})
    parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(PoolFormerError, match="has 200,000 rows, more than bytes"):
        open_parquet(str(tmp_path), *COLUMNS)


def test_one_long_path_among_many_rows_is_refused(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text(f"file_name,label\n{'a' * 30_000},b\n" + "a,b\n" * 1_000)
    with at_most(OVERHEAD), pytest.raises(PoolFormerError, match="a path of 30,000 characters beside short ones"):
        open_label_file(str(path), *COLUMNS)


def test_one_long_name_in_an_archive_is_refused(tmp_path):
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("a" * 30_000))
    with pytest.raises(PoolFormerError, match="damaged or cut off: a name of 30,000 characters"):
        list(list_members(tmp_path / "images.tar", 0))


def test_images_that_expand_from_next_to_no_bytes_are_refused(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setattr("train.data.sources.parquet._CACHE_BYTES", 1 << 20)
    table = pyarrow.table({"image": pyarrow.repeat(pyarrow.scalar(bytes(1 << 18)), 20), "label": ["a", "b"] * 10})
    parquet.write_table(table, tmp_path / "train.parquet", compression="gzip")
    source = open_parquet(str(tmp_path), *COLUMNS)
    with pytest.raises(PoolFormerError, match=r"its column image has more than .* bytes"):
        source[0]


def test_few_rows_are_read_at_a_time_whatever_size_the_file_states(tmp_path):
    """A value of 4 MB that 2,000 rows share takes 4 kB in the file, which may state any size for it."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"image": [b"x"] * 1_000}), tmp_path / "train.parquet")
    assert max(len(batch) for batch in read_batches(tmp_path / "train.parquet", "image", [0])) <= 64


def test_labels_that_expand_from_next_to_no_bytes_are_refused(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setattr("train.data.sources.parquet._CACHE_BYTES", 1 << 20)
    table = pyarrow.table({"image": [b"x"] * 20, "label": pyarrow.repeat(pyarrow.scalar("a" * (1 << 18)), 20)})
    parquet.write_table(table, tmp_path / "train.parquet", compression="gzip")
    with pytest.raises(PoolFormerError, match=r"its column label has more than .* bytes"):
        open_parquet(str(tmp_path), *COLUMNS)


def test_a_damaged_parquet_file_is_named_or_read_as_it_was(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def read(path):
        source = open_parquet(str(path), *COLUMNS)
        return [source[row] for row in range(len(source))]

    images = [{"bytes": bytes([row] * 40), "path": None} for row in range(12)]
    table = pyarrow.table({"image": images, "label": ["a", "b"] * 6})
    parquet.write_table(table, tmp_path / "train.parquet", row_group_size=4, write_page_checksum=True)
    sound, expected = (tmp_path / "train.parquet").read_bytes(), read(tmp_path / "train.parquet")
    rng, refused = random.Random(0), 0
    for number in range(80):
        damaged = bytearray(sound)
        damaged[rng.randrange(4, len(sound))] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "train.parquet").write_bytes(damaged)
        try:
            assert read(folder / "train.parquet") == expected
        except PoolFormerError as error:
            refused += 1
            assert str(folder) in str(error)
    assert refused > 20


def test_a_parquet_file_with_other_numbers_of_rows_in_its_row_groups_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"image": [b"x"] * 8, "label": ["a", "b"] * 4})
    parquet.write_table(table, tmp_path / "train.parquet", row_group_size=4)
    data = (tmp_path / "train.parquet").read_bytes()
    rows = b"\x16\x10\x19"  # of the file: a field of 64 bits, 8 (zigzag), and the list of row groups after it
    assert data.count(rows) == 1
    (tmp_path / "train.parquet").write_bytes(data.replace(rows, b"\x16\x14\x19"))
    with pytest.raises(PoolFormerError, match="it has 10 rows, and 8 in its row groups"):
        open_parquet(str(tmp_path), *COLUMNS)


@pytest.mark.parametrize(
    ("row", "problem", "message"),
    [
        ({"file_name": "a\0.png", "label": "a"}, "single_label_classification", "a null character in its name"),
        (
            {"file_name": "a.png", "label": "9" * 5_000},
            "single_label_classification",
            "cannot be read|no image",
        ),
        ({"file_name": "a.png", "label": 10**400}, "regression", "Expected finite numbers"),
        ({"file_name": "a.png", "label": 1e300}, "regression", "holds 1e.300. Expected finite numbers"),
    ],
)
def test_a_label_file_with_an_impossible_value_gets_one_sentence(tmp_path, row, problem, message):
    others = [{"file_name": f"{number}.png", "label": number} for number in range(4)]
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(f"{json.dumps(one)}\n" for one in [row, *others]))
    with pytest.raises(PoolFormerError, match=message):
        source = open_label_file(str(path), "train", 0.2, None, "label", problem)
        for index in range(len(source)):
            if isinstance(image := source[index]["image"], ImageError):
                raise image

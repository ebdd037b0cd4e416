"""Labels in CSV and JSONL files, and Parquet as Hugging Face `datasets` writes it: their images, splits and classes."""

import csv
import dataclasses
import io
import json

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from small_data import assert_same, take
from train.data import (
    DataConfig,
    HostAugmentation,
    PrepareConfig,
    SourceError,
    describe_split,
    describe_unused_test,
    find_splits,
    open_source,
    prepare_data,
)
from train.data.sources.parquet import _GroupCache

NAMES = ("bee", "ant", "class 10", "class 2")
CLASSES = ("ant", "bee", "class 2", "class 10")  # sorted, numbers by value


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty images, whose label is in their colour: file number % 4."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "photos").mkdir()
    for number in range(40):
        Image.new("RGB", (12, 10), (60 * (number % 4), number, 0)).save(root / "photos" / f"{number:02d}.png")
    return root


def rows(numbers):
    return [{"file_name": f"photos/{number:02d}.png", "label": NAMES[number % 4]} for number in numbers]


def write_csv(path, lines):
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def write_jsonl(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_parquet(path, folder, numbers, named=True):
    images = [{"bytes": (folder / f"photos/{n:02d}.png").read_bytes(), "path": f"{n:02d}.png"} for n in numbers]
    labels = [CLASSES.index(NAMES[number % 4]) for number in numbers] if named else [NAMES[n % 4] for n in numbers]
    table = pa.table({"image": images, "label": labels})
    features = {"image": {"_type": "Image"}, "label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    if named:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(table, path, row_group_size=7)


def config(source, **changes):
    augment = HostAugmentation(randaugment="none")
    return dataclasses.replace(
        DataConfig(source=source, image_size=8, batch_size=8, workers=0, held_out=0.2, augment=augment), **changes
    )


def assert_labelled(source):
    """Every label is that of its image."""
    assert source.class_names == CLASSES
    for example in source.__getitems__(range(len(source))):
        with Image.open(io.BytesIO(example["image"])) as image:
            red = image.getpixel((0, 0))[0]
        assert CLASSES[example["label"]] == NAMES[red // 60]


@pytest.fixture(params=["one csv", "one jsonl", "split column", "csv of each split", "metadata", "parquet", "names"])
def source(request, folder):
    """A data set of 32 training and 8 held-out images in each layout."""
    root = folder.parent / request.param.replace(" ", "-")
    (root).mkdir(exist_ok=True)
    if not (root / "photos").exists():
        (root / "photos").symlink_to(folder / "photos")
    train, validation = range(32), range(32, 40)
    match request.param:
        case "one csv":
            write_csv(root / "labels.csv", rows(range(40)))
            return f"labels:{root}/labels.csv"
        case "one jsonl":
            write_jsonl(root / "labels.jsonl", rows(range(40)))
            return f"labels:{root}/labels.jsonl"
        case "split column":
            parts = [{**row, "split": "train" if place < 32 else "val"} for place, row in enumerate(rows(range(40)))]
            write_csv(root / "all.csv", parts)
            return f"labels:{root}/all.csv"
        case "csv of each split":
            write_csv(root / "train.csv", rows(train))
            write_csv(root / "val.csv", rows(validation))
            return f"labels:{root}"
        case "metadata":
            for split, numbers in (("train", train), ("validation", validation)):
                there = [{**row, "file_name": f"../{row['file_name']}"} for row in rows(numbers)]
                write_csv(root / split / "metadata.csv", there)
            return f"labels:{root}"
        case _:
            named = request.param == "parquet"
            write_parquet(root / "data" / "train-00000-of-00002.parquet", folder, range(20), named)
            write_parquet(root / "data" / "train-00001-of-00002.parquet", folder, range(20, 32), named)
            write_parquet(root / "data" / "validation-00000-of-00001.parquet", folder, validation, named)
            return f"parquet:{root}"


def test_every_layout_gives_the_same_images_and_labels(source):
    train, validation = (open_source(config(source), split) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (32, 8)
    assert (
        len({example["id"] for part in (train, validation) for example in map(part.__getitem__, range(len(part)))})
        == 40
    )
    assert_labelled(train)
    assert_labelled(validation)
    assert len(open_source(config(source), "train+validation")) == 40


@pytest.mark.parametrize("kind", ["labels", "parquet"])
def test_batches_are_the_same_on_any_number_of_processes_and_workers(folder, tmp_path, kind):
    write_csv(folder / "labels.csv", rows(range(40)))
    write_parquet(tmp_path / "train.parquet", folder, range(40))
    chosen = config(f"labels:{folder}/labels.csv" if kind == "labels" else f"parquet:{tmp_path}")
    source = open_source(chosen, "train")
    alone = take(chosen, source, 5)
    parts = [take(chosen, source, 5, process_index=p, process_count=2) for p in range(2)]
    together = [{name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in zip(*parts)]
    assert_same(together, alone)
    assert_same(take(dataclasses.replace(chosen, workers=1), source, 2, start_step=3), alone[3:])


def test_a_class_map_gives_the_order_of_the_labels_also_in_packed_data(folder, tmp_path):
    (tmp_path / "map.txt").write_text("class 2\nclass 10\nzebra\nbee\nant\n")
    write_parquet(tmp_path / "train.parquet", folder, range(40))
    mapped = config(f"parquet:{tmp_path}", class_map=tmp_path / "map.txt")
    train = open_source(mapped, "train")
    assert train.class_names == ("class 2", "class 10", "zebra", "bee", "ant")
    packed = prepare_data(
        PrepareConfig(f"parquet:{tmp_path}", tmp_path / "packed", held_out=0.2, class_map=tmp_path / "map.txt")
    )
    again = open_source(config(f"tfds:{packed.folder}"), "train")
    assert (again.class_names, len(again)) == (train.class_names, len(train))
    pairs = [
        {(example["image"], example["label"]) for example in map(part.__getitem__, range(len(part)))}
        for part in (train, again)
    ]
    assert pairs[0] == pairs[1]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"path": "a.png", "label": "x"}], "no column 'file_name'. It has: path, label"),
        ([{"file_name": "a.png", "label": ""}, {"file_name": "b.png", "label": "x"}], "line 2 has no 'label'. Exp"),
        ([{"file_name": "a.png", "label": "x|y"}], "line 2 has several classes in 'label'"),
        (
            [{"file_name": f"{place}a.png", "label": label} for place, label in (("", "x"), ("./", "y"))],
            "name an image again: 1; the first image is a.png, as x in line 2 and as y in line 3",
        ),
        ([{"file_name;label": "a.png;x"}], "no column 'file_name'. It has: file_name;label. Separate the columns with"),
        ([{"file_name": "a.png", "label": "x", "split": "odd"}], "no split 'train2'. It has: odd"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(tmp_path, lines, message):
    write_csv(tmp_path / "labels.csv", lines)
    with pytest.raises(SourceError, match=message.replace(".", r"\.")):
        open_source(config(f"labels:{tmp_path}/labels.csv"), "train2")


def test_json_that_is_nested_without_end_is_refused(tmp_path):
    (tmp_path / "labels.jsonl").write_text("[" * 100_000)
    with pytest.raises(SourceError, match="cannot be read: maximum recursion depth exceeded"):
        open_source(config(f"labels:{tmp_path}/labels.jsonl"), "train")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("labels.csv", "file_name,label\na.png,x\nb.png,x,y\n", "line 3 has more values than the header has columns"),
        ("labels.jsonl", '{"file_name": "a.png", "label": "x"}\n\n{"file_name"\n', "in line 3, column 13"),
    ],
)
def test_a_broken_line_is_refused_with_its_number_in_the_file(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(SourceError, match=message):
        open_source(config(f"labels:{tmp_path / name}"), "train")


def divided(folder, *names):
    """A CSV file with ten rows of each split, in the order of the names; returns the source."""
    parts = [{**row, "split": names[place // 10]} for place, row in enumerate(rows(range(10 * len(names))))]
    write_csv(folder / "divided.csv", parts)
    return config(f"labels:{folder}/divided.csv")


def test_the_column_of_splits_takes_capital_letters(folder):
    chosen = divided(folder, "Train", " Validation")
    assert [len(open_source(chosen, split)) for split in ("train", "validation")] == [10, 10]


@pytest.mark.parametrize(
    ("names", "split"), [(("test",), "train"), (("training", "Dev"), "train"), (("train", "dev"), "validation")]
)
def test_unknown_splits_are_named_and_not_trained_on(folder, names, split):
    with pytest.raises(SourceError, match=f"no split '{split}'. It has: {', '.join(names)}. .*--data.train-split"):
        open_source(divided(folder, *names), split)
    assert len(open_source(divided(folder, *names), names[-1])) == 10


@pytest.mark.parametrize("kind", ["labels", "parquet"])
def test_files_of_splits_with_other_names_are_refused(folder, tmp_path, kind):
    write_csv(tmp_path / "train.csv", rows(range(8)))
    write_csv(tmp_path / "Validation.csv", rows(range(8, 12)))
    write_parquet(tmp_path / "Train-0.parquet", folder, range(8))
    write_parquet(tmp_path / "dev-0.parquet", folder, range(8, 12))
    with pytest.raises(SourceError, match=r"Validation\.csv in .* would not be read|such as Train-0\.parquet"):
        open_source(config(f"{kind}:{tmp_path}"), "train")


def test_an_image_in_two_splits_is_refused(tmp_path):
    for name, numbers in (("train", range(6)), ("validation", range(5, 9))):
        write_csv(tmp_path / f"{name}.csv", rows(numbers))
    with pytest.raises(SourceError, match=r"05\.png, as ant in line 7 of train and as ant in line 2 of validation"):
        open_source(config(f"labels:{tmp_path}"), "validation")


def test_spaces_around_a_class_do_not_make_another(folder):
    write_csv(folder / "spaces.csv", [{**row, "label": f" {row['label']} "} for row in rows(range(8))])
    assert_labelled(open_source(config(f"labels:{folder}/spaces.csv"), "train+validation"))


def test_paths_of_windows_are_read(folder):
    write_csv(
        folder / "windows.csv", [{**row, "file_name": row["file_name"].replace("/", "\\")} for row in rows(range(8))]
    )
    assert_labelled(open_source(config(f"labels:{folder}/windows.csv"), "train+validation"))


@pytest.mark.parametrize("kind", ["labels", "parquet"])
def test_the_part_of_a_table_that_is_scored_is_described(folder, tmp_path, kind):
    write_csv(tmp_path / "all.csv", rows(range(12)))
    write_parquet(tmp_path / "all.parquet", folder, range(12))
    whole = config(f"{kind}:{tmp_path}/all.{'csv' if kind == 'labels' else kind}")
    assert find_splits(whole) == ()
    assert describe_split(whole) == "split validation (20 % of every class, which training holds out)"
    assert describe_split(dataclasses.replace(whole, evaluation_split="train+validation")) == "all images"
    assert describe_unused_test(whole) == ""
    (tmp_path / "parts").mkdir()
    for split, numbers in (("train", range(8)), ("test", range(8, 12))):
        write_csv(tmp_path / "parts" / f"{split}.csv", rows(numbers))
        write_parquet(tmp_path / "parts" / f"{split}.parquet", folder, numbers)
    parts = config(f"{kind}:{tmp_path}/parts")
    assert sorted(find_splits(parts)) == ["test", "train"]
    assert describe_unused_test(parts) == "the split test is not used: evaluate --split test scores it"
    assert describe_unused_test(dataclasses.replace(parts, evaluation_split="test")) == ""


def test_an_unknown_class_in_validation_is_refused(tmp_path):
    write_csv(tmp_path / "train.csv", [{"file_name": "a.png", "label": "x"}])
    write_csv(tmp_path / "validation.csv", [{"file_name": "b.png", "label": "y"}])
    with pytest.raises(SourceError, match=r"training does not have: y"):
        open_source(config(f"labels:{tmp_path}"), "validation")


def write_labels(path, labels, names=None):
    image = io.BytesIO()
    Image.new("RGB", (12, 10)).save(image, "PNG")
    table = pa.table({"image": [image.getvalue()] * len(labels), "label": labels})
    features = {"info": {"features": {"label": {"names": names}}}}
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)} if names else None), path)


@pytest.mark.parametrize("kind", ["labels", "parquet"])
def test_numbers_without_names_are_the_same_classes_in_every_split(tmp_path, kind):
    for split, labels in (("train", [30, 1, 2]), ("validation", [2, 1])):
        if kind == "parquet":
            write_labels(tmp_path / f"{split}.parquet", labels)
        else:
            rows = [{"file_name": f"{split}{row}.png", "label": label} for row, label in enumerate(labels)]
            write_jsonl(tmp_path / f"{split}.jsonl", rows)
    for split, expected in (("train", ["30", "1", "2"]), ("validation", ["2", "1"])):
        source = open_source(config(f"{kind}:{tmp_path}"), split)
        assert source.class_names == ("1", "2", "30")
        assert [source.class_names[label] for label in source.labels] == expected


@pytest.mark.parametrize("label", [0.7, float("nan"), 2, 2**40, -2])
def test_numbers_of_named_classes_are_checked(tmp_path, label):
    write_labels(tmp_path / "train.parquet", [0, label], ["ant", "bee"])
    with pytest.raises(SourceError, match=rf"has the label {label}\. Expected whole numbers from 0 to 1\."):
        open_source(config(f"parquet:{tmp_path}"), "train")


def test_the_row_groups_read_last_stay_in_memory_within_a_limit(tmp_path):
    names, size = [], 1000
    for number in range(3):
        names.append(tmp_path / f"{number}.parquet")
        parquet.write_table(pa.table({"image": [bytes([number]) * size]}), names[-1])
    cache = _GroupCache(limit=2 * size + 500)
    for file in (names[0], names[1], names[0], names[2]):
        assert cache.read(file, 0, "image")[0].as_py() == bytes([int(file.stem)]) * size
    assert [(file, 0, "image") in cache for file in names] == [True, False, True]
    small = _GroupCache(limit=1)
    assert small.read(names[0], 0, "image") is small.read(names[0], 0, "image")

"""ImageNet's three archives become packed shards."""

import os

import pytest

from packing import SYNSETS, VALIDATION, examples_of, jpeg, write_archives
from poolformer_jax.errors import InputError
from train.data import DataConfig, SourceError, open_source, prepare_data


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

"""False shard indices and safetensors headers are refused with one error, and reach no file outside their folder."""

import json
import struct

import numpy as np
import pytest
import safetensors.numpy

from refusals import refused


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "folder/secret.safetensors",
        "..",
        "",
        "..\\secret.safetensors",
        "C:secret",
    ],
)
def test_a_shard_index_reaches_no_file_outside_its_folder(tmp_path, shard):
    folder = tmp_path / "model"
    (folder / "folder").mkdir(parents=True)
    for target in (tmp_path / "secret.safetensors", folder / "folder" / "secret.safetensors"):
        safetensors.numpy.save_file({"weight": np.ones(2, np.float32)}, target)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": shard}}))
    refused(index, "expected the name of a file beside it|is not beside it")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("", "not an index of a sharded file"),
        ("[" * 100_000, "not an index of a sharded file"),
        ("{}", "not an index of a sharded file"),
        ('{"weight_map": []}', "not a mapping from tensor names to file names"),
        ('{"weight_map": {"a": 3}}', "not a mapping from tensor names to file names"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "the shard gone.safetensors is not beside it"),
        (r'{"weight_map": {"a": "gone\nerror: "}}', r"the shard gone\\nerror:  is not beside it"),
        ('{"weight_map": {"b": "one.safetensors"}}', "places b in one.safetensors, which does not have it"),
        ('{"weight_map": {"a": "two.safetensors"}}', "two.safetensors has b, which the index does not place there"),
    ],
)
def test_a_wrong_shard_index_is_refused(tmp_path, index, message):
    safetensors.numpy.save_file({"a": np.ones(2, np.float32)}, tmp_path / "one.safetensors")
    safetensors.numpy.save_file({"a": np.ones(2), "b": np.ones(2)}, tmp_path / "two.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    refused(tmp_path / "model.safetensors.index.json", message)


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, 8),
        ({"w": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 1 << 62]}}, 16),
        ({"w": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}, 16),
        ({n: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for n in "vw"}, 16),
        ({"w": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}, 16),
        ({"w": {"dtype": "F8_E4M3", "shape": [16], "data_offsets": [0, 16]}}, 16),
    ],
)
def test_a_false_safetensors_header_is_refused(tmp_path, header, data):
    encoded = json.dumps(header).encode()
    path = tmp_path / "lies.safetensors"
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(data))
    refused(path, "the safetensors library rejects it|which is not supported")


def test_a_very_long_header_or_index_is_refused_without_reading_it(tmp_path):
    header = b"{}" + b" " * (17 << 20)
    (tmp_path / "long.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refused(tmp_path / "long.safetensors", "its header claims 17825794 bytes")
    (tmp_path / "model.safetensors.index.json").write_bytes(header)
    refused(tmp_path / "model.safetensors.index.json", "not an index of a sharded file")

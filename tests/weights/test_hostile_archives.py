"""Damaged archives, and archives with false sizes, are refused with one error before memory is allocated."""

import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

import archives
from paths import TESTS
from poolformer_jax.weights import WeightsFileError, open_weights
from refusals import nothing_runs, read_all, refused

FIXTURES = TESTS / "fixtures"


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ({"offset": 1}, "outside its 6 stored numbers"),
        ({"offset": -1}, "expected integers of 0 or more"),
        ({"shape": (2, 4)}, "outside its 6 stored numbers|strides overlap"),
        ({"shape": (3, 3), "strides": (1, 1)}, "strides overlap"),
        ({"shape": (1 << 20, 1 << 20), "strides": (0, 0)}, "strides overlap"),
        ({"shape": (2, -3)}, "expected integers of 0 or more"),
        ({"shape": (2, 3, 1)}, "not a tensor's shape"),
        ({"shape": (1 << 70, 0)}, "expected integers of 0 or more"),
        ({"count": 7}, "has 24 bytes, and its pickle declares 7 numbers of type float32, 28 bytes"),
        ({"count": 1 << 50}, "has 24 bytes, and its pickle declares"),
        ({"count": 1 << 63}, "claims 9223372036854775808 numbers"),
        ({"count": -6}, "claims -6 numbers"),
        ({"stored": 5}, "has 20 bytes"),
    ],
)
def test_a_tensor_outside_of_its_storage_is_refused(tmp_path, view, message):
    refused(archives.one_tensor(tmp_path / "tensor.pth", **view), message)


def test_the_unchanged_tensor_of_those_tests_is_read(tmp_path):
    np.testing.assert_array_equal(
        read_all(archives.one_tensor(tmp_path / "tensor.pth"))["weight"], [[0, 1, 2], [3, 4, 5]]
    )


def test_many_names_of_one_storage_are_refused(tmp_path):
    stored = np.zeros(1 << 18, np.float32).tobytes()
    one = archives.tensor(archives.storage("0", 1 << 18), (1 << 18,), (1,))
    pickled = archives.program(archives.dict_of({f"weight{i}": one for i in range(100)}))
    refused(archives.zip_archive(tmp_path / "many.pth", pickled, {"0": stored}), "many of them share one storage")


def test_a_compressed_archive_is_refused_without_unpacking(tmp_path):
    pickled = archives.program(
        archives.dict_of({"w": archives.tensor(archives.storage("0", 1 << 24), (1 << 24,), (1,))})
    )
    bomb = archives.zip_archive(tmp_path / "bomb.pth", pickled, {"0": bytes(1 << 26)}, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1 << 20
    refused(bomb, "compressed or encrypted")


def test_an_archive_directory_that_claims_gigabytes_is_refused(tmp_path):
    path = archives.one_tensor(tmp_path / "directory.pth")
    content = bytearray(path.read_bytes())
    end = content.rindex(b"PK\x05\x06")
    content[end + 12 : end + 16] = struct.pack("<I", 0xF0000000)
    path.write_bytes(content)
    refused(path, "zip archive is damaged|claims")


def test_two_records_of_the_same_name_are_refused(tmp_path):
    path = archives.one_tensor(tmp_path / "twice.pth")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data/0", np.ones(6, np.float32).tobytes())
    refused(path, "two records of the same name")


@pytest.mark.parametrize("file", ["hf.bin", "timm_float16_legacy.pth", "hf_sharded/model-00001-of-00002.safetensors"])
def test_a_truncated_file_is_refused(tmp_path, file):
    whole = (FIXTURES / file).read_bytes()
    path = tmp_path / Path(file).name
    for length in [*range(0, len(whole), len(whole) // 15 + 1), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with nothing_runs(), pytest.raises(WeightsFileError):
            read_all(path)


def test_a_changed_byte_is_found_by_its_checksum(tmp_path):
    path = archives.one_tensor(tmp_path / "flipped.pth")
    content = bytearray(path.read_bytes())
    content[content.index(np.arange(6, dtype=np.float32).tobytes()) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsFileError, match=r"is damaged: the 24 bytes from byte .* do not match their checksum"):
        read_all(path)


def test_a_file_that_shrinks_after_opening_is_an_error(tmp_path):
    path = archives.one_tensor(tmp_path / "shrinks.pth")
    opened = open_weights(path)
    path.write_bytes(b"")
    with pytest.raises(WeightsFileError, match="became shorter while it was read"):
        np.asarray(opened.tensors["weight"])

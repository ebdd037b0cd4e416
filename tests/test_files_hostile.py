"""A damaged or hostile weights file ends in one clear error, runs nothing, and takes no memory it does not justify."""

import io
import json
import os
import pickle
import pickletools
import shutil
import struct
import sys
import tracemalloc
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import archives
from poolformer_jax.torch_weights import pickles
from poolformer_jax.torch_weights.files import WeightsFileError, open_weights

FIXTURES = Path(__file__).parent / "fixtures"
# What a file may cost beyond its own size: the reader's own bookkeeping, and one piece of structure.
OVERHEAD = 8 << 20


def read_all(path):
    return {name: np.asarray(tensor) for name, tensor in open_weights(path).tensors.items()}


@contextmanager
def at_most(size):
    """Fails if the block allocates more than `size` bytes at any moment."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()


# Looking a name up for a pickle, starting a program, opening a connection: none of it belongs to reading weights.
_FORBIDDEN = ("pickle.", "os.", "subprocess.", "shutil.", "socket.", "ctypes.")
_HARMLESS = ("os.scandir", "os.listdir")
_watching: list[list[str]] = []


def _watch(event, _):
    if _watching and event.startswith(_FORBIDDEN) and event not in _HARMLESS:
        _watching[-1].append(event)


sys.addaudithook(_watch)


@contextmanager
def nothing_runs():
    """Fails if the block does anything of `_FORBIDDEN`, by Python's own audit events."""
    _watching.append([])
    try:
        yield
    finally:
        seen = _watching.pop()
    assert not seen


def refused(path, message):
    with (
        nothing_runs(),
        at_most(path.stat().st_size + OVERHEAD),
        pytest.raises(WeightsFileError, match=message) as error,
    ):
        read_all(path)
    assert str(path) in str(error.value)


class Payload:
    """An object whose pickle calls a function of the attacker's choice."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, rf"{os.name}\.system"),
        (eval, r"(__builtin__|builtins)\.eval"),
        (exec, r"(__builtin__|builtins)\.exec"),
        (getattr, r"(__builtin__|builtins)\.getattr"),
        (__import__, r"(__builtin__|builtins)\.__import__"),
        (pickle.loads, r"(_pickle|cPickle|pickle)\.loads"),
        (io.open, r"(_?io|__builtin__|builtins)\.open"),
    ],
)
def test_a_pickle_that_calls_a_function_is_refused_by_its_name_and_calls_nothing(tmp_path, function, name, protocol):
    victim = tmp_path / "victim"
    pickled = pickle.dumps({"weight": Payload(function, f"touch {victim}")}, protocol)
    refused(archives.zip_archive(tmp_path / "hostile.pth", pickled, {}), f"asks for {name}, .* Nothing was run")
    assert not victim.exists()


def test_a_code_object_is_refused(tmp_path):
    body = archives.call(archives.name_of("types", "CodeType"), archives.integer(0))
    path = archives.zip_archive(tmp_path / "code.pth", archives.program(archives.dict_of({"weight": body})), {})
    refused(path, r"asks for types\.CodeType")


def test_a_call_of_something_that_was_only_data_is_refused(tmp_path):
    body = archives.call(archives.text("os.system"), archives.text("true"))
    path = archives.zip_archive(tmp_path / "call.pth", archives.program(body), {})
    refused(path, "its pickle is damaged .calls a str")


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ({"offset": 1}, "reaches outside its 6 stored numbers"),
        ({"offset": -1}, "expected integers of 0 or more"),
        ({"shape": (2, 4)}, "reaches outside its 6 stored numbers|strides overlap"),
        ({"shape": (3, 3), "strides": (1, 1)}, "strides overlap"),
        ({"shape": (1 << 20, 1 << 20), "strides": (0, 0)}, "strides overlap"),
        ({"shape": (2, -3)}, "expected integers of 0 or more"),
        ({"shape": (2, 3, 1)}, "no shape of a tensor"),
        ({"shape": (1 << 70, 0)}, "expected integers of 0 or more"),
        ({"count": 7}, "has 24 bytes, and the pickle speaks of 7 numbers of type float32, which are 28"),
        ({"count": 1 << 50}, "has 24 bytes, and the pickle speaks of"),
        ({"count": 1 << 63}, "claims 9223372036854775808 numbers"),
        ({"count": -6}, "claims -6 numbers"),
        ({"stored": 5}, "has 20 bytes"),
    ],
)
def test_a_tensor_that_its_numbers_do_not_hold_is_refused(tmp_path, view, message):
    refused(archives.one_tensor(tmp_path / "tensor.pth", **view), message)


def test_the_tensors_those_tests_start_from_are_sound(tmp_path):
    np.testing.assert_array_equal(
        read_all(archives.one_tensor(tmp_path / "tensor.pth"))["weight"], [[0, 1, 2], [3, 4, 5]]
    )


def test_many_names_for_one_storage_do_not_multiply_it(tmp_path):
    stored = np.zeros(1 << 18, np.float32).tobytes()
    one = archives.tensor(archives.storage("0", 1 << 18), (1 << 18,), (1,))
    pickled = archives.program(archives.dict_of({f"weight{i}": one for i in range(100)}))
    refused(archives.zip_archive(tmp_path / "many.pth", pickled, {"0": stored}), "many of them share one storage")


def test_a_compressed_archive_is_refused_before_anything_is_unpacked(tmp_path):
    pickled = archives.program(
        archives.dict_of({"w": archives.tensor(archives.storage("0", 1 << 26), (1 << 26,), (1,))})
    )
    bomb = archives.zip_archive(tmp_path / "bomb.pth", pickled, {"0": bytes(1 << 28)}, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1 << 20
    refused(bomb, "compressed or encrypted")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"N" + b"r" + struct.pack("<I", 0x7FFFFFFF), "state dict"),  # a memo of 2^31 entries
        (b"\x8d" + struct.pack("<Q", 1 << 62), "claims 4611686018427387904 bytes"),
        (b"X" + struct.pack("<I", 0xFFFFFFFF), "claims 4294967295 bytes"),
        (b"\x8b" + struct.pack("<I", 0x7FFFFFFF), "claims 2147483647 bytes"),
        (b"\x96" + struct.pack("<Q", 1 << 62), "the instruction BYTEARRAY8"),
        (b"(" * 1000 + b"t" * 1001, "damaged"),
        (b")" + b"\x85" * 20_000 + b"}" + b"2" + b"N" + b"s", "damaged"),  # a nested tuple as a key, which recurses
        (b"}" + b")" + b"\x85" * 20_000 + b"Ns", "a dict's key is a tuple"),
        (b"cos\nsystem", "truncated"),
        (b"h\x05", "damaged"),
        (b"\xff", "the instruction 0xff"),
        (b"", "damaged"),
    ],
)
def test_a_pickle_that_asks_for_more_than_it_holds_is_refused(tmp_path, body, message):
    path = archives.zip_archive(tmp_path / "greedy.pth", archives.program(body), {})
    with nothing_runs(), at_most(OVERHEAD), pytest.raises(WeightsFileError, match=message):
        read_all(path)


def test_a_pickle_of_endless_instructions_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_INSTRUCTIONS", 1000)
    path = archives.zip_archive(tmp_path / "endless.pth", archives.program(b"}" * 1001), {})
    refused(path, "more than 1000 instructions")


def test_one_big_argument_handed_to_many_calls_is_not_copied_for_each(tmp_path):
    # 10,000 numbers in a list, and 1,000 torch.Size of it.
    body = b"]q\x00(" + b"K\x01" * 10_000 + b"e" + (archives.name_of("torch", "Size") + b"h\x00\x85R") * 1000
    refused(
        archives.zip_archive(tmp_path / "copies.pth", archives.program(body), {}), "builds a size of something else"
    )


def test_a_directory_of_the_archive_that_claims_gigabytes_is_refused(tmp_path):
    path = archives.one_tensor(tmp_path / "directory.pth")
    content = bytearray(path.read_bytes())
    end = content.rindex(b"PK\x05\x06")
    content[end + 12 : end + 16] = struct.pack("<I", 0xF0000000)
    path.write_bytes(content)
    refused(path, "zip archive is damaged|claims")


def test_two_records_of_one_name_are_refused(tmp_path):
    path = archives.one_tensor(tmp_path / "twice.pth")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data/0", np.ones(6, np.float32).tobytes())
    refused(path, "two records of one name")


@pytest.mark.parametrize("file", ["hf.bin", "timm_float16_legacy.pth", "hf_sharded/model-00001-of-00002.safetensors"])
def test_a_file_cut_short_anywhere_is_refused(tmp_path, file):
    whole = (FIXTURES / file).read_bytes()
    path = tmp_path / Path(file).name
    for length in [*range(0, len(whole), len(whole) // 40 + 1), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with nothing_runs(), pytest.raises(WeightsFileError):
            read_all(path)


def test_a_damaged_number_is_found_by_its_checksum(tmp_path):
    path = archives.one_tensor(tmp_path / "flipped.pth")
    content = bytearray(path.read_bytes())
    content[content.index(np.arange(6, dtype=np.float32).tobytes()) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsFileError, match="is damaged: the checksum of the 24 bytes"):
        read_all(path)


def test_a_file_that_shrinks_between_opening_and_reading_is_an_error(tmp_path):
    path = archives.one_tensor(tmp_path / "shrinks.pth")
    opened = open_weights(path)
    path.write_bytes(b"")
    with pytest.raises(WeightsFileError, match="became shorter while it was read"):
        np.asarray(opened.tensors["weight"])


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
def test_a_shard_index_reaches_no_file_beyond_its_folder(tmp_path, shard):
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
        ("", "no index of a sharded file"),
        ("[" * 100_000, "no index of a sharded file"),
        ("{}", "no index of a sharded file"),
        ('{"weight_map": []}', "no mapping from tensor names to file names"),
        ('{"weight_map": {"a": 3}}', "no mapping from tensor names to file names"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "the shard gone.safetensors is not beside it"),
        ('{"weight_map": {"b": "one.safetensors"}}', "places b in one.safetensors, which does not hold that"),
        ('{"weight_map": {"a": "two.safetensors"}}', "two.safetensors holds b, which the index does not place there"),
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
def test_a_safetensors_header_that_lies_is_refused(tmp_path, header, data):
    encoded = json.dumps(header).encode()
    path = tmp_path / "lies.safetensors"
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(data))
    refused(path, "the safetensors library refuses it|which no PoolFormer has")


def test_a_header_or_index_of_endless_text_is_refused_unread(tmp_path):
    header = b"{}" + b" " * (17 << 20)
    (tmp_path / "long.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refused(tmp_path / "long.safetensors", "claims a header of 17825794 bytes")
    (tmp_path / "model.safetensors.index.json").write_bytes(header)
    refused(tmp_path / "model.safetensors.index.json", "no index of a PoolFormer needs that many")


def test_a_state_dict_with_something_else_in_it_is_refused_by_name(tmp_path):
    stored = archives.tensor(archives.storage("0", 2), (2,), (1,))
    body = archives.dict_of({"weight": stored, "version": archives.integer(3)})
    path = archives.zip_archive(tmp_path / "mixed.pth", archives.program(body), {"0": bytes(8)})
    refused(path, r"something else than tensors by name: version \(a int\)")


def opens_or_is_refused(path):
    """The only two ends a file can come to."""
    with nothing_runs(), at_most(path.stat().st_size * 3 + OVERHEAD):
        try:
            read_all(path)
        except WeightsFileError:
            return


FUZZ = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
SEEDS = {
    name: (FIXTURES / name).read_bytes()
    for name in ("views.pth", "views_legacy.pth", "hf_sharded/model-00002-of-00002.safetensors")
}
EDITS = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True), st.sampled_from(["set", "insert", "cut"]), st.binary(min_size=1, max_size=9)
    ),
    min_size=1,
    max_size=6,
)


def edited(content, edits):
    content = bytearray(content)
    for place, kind, data in edits:
        at = int(place * len(content))
        content[at : at + (0 if kind == "insert" else len(data))] = b"" if kind == "cut" else data
    return bytes(content)


@pytest.mark.parametrize("seed", SEEDS)
@FUZZ
@given(edits=EDITS)
def test_fuzz_a_real_file_with_bytes_changed(tmp_path, seed, edits):
    path = tmp_path / Path(seed).name
    path.write_bytes(edited(SEEDS[seed], edits))
    opens_or_is_refused(path)


@FUZZ
@given(edits=EDITS)
def test_fuzz_a_real_pickle_with_bytes_changed_in_a_sound_archive(tmp_path, edits):
    with zipfile.ZipFile(FIXTURES / "views.pth") as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    storages = {name.removeprefix("data/"): content for name, content in records.items() if name.startswith("data/")}
    path = archives.zip_archive(tmp_path / "fuzz.pth", edited(records["data.pkl"], edits), storages)
    opens_or_is_refused(path)


PIECES = st.one_of(
    st.sampled_from([opcode.code.encode("latin-1") for opcode in pickletools.opcodes]),
    st.integers(-(2**70), 2**70).map(archives.integer),
    st.text(max_size=8).map(archives.text),
    st.sampled_from(["0", "storage"]).map(archives.text),
    st.sampled_from(
        [
            archives.name_of("torch._utils", "_rebuild_tensor_v2"),
            archives.name_of("torch", "FloatStorage"),
            archives.name_of("collections", "OrderedDict"),
            archives.name_of("argparse", "Namespace"),
            archives.storage("0", 6),
            archives.tensor(archives.storage("0", 6), (2, 3), (3, 1)),
        ]
    ),
    st.binary(max_size=4),
)


@FUZZ
@given(pieces=st.lists(PIECES, max_size=40))
def test_fuzz_programs_of_pickle_instructions(tmp_path, pieces):
    path = archives.zip_archive(tmp_path / "fuzz.pth", archives.program(b"".join(pieces)), {"0": bytes(24)})
    opens_or_is_refused(path)


@FUZZ
@given(content=st.binary(max_size=400))
def test_fuzz_any_bytes(tmp_path, content):
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(content)
    opens_or_is_refused(path)
    shutil.move(path, tmp_path / "fuzz.pth")
    opens_or_is_refused(tmp_path / "fuzz.pth")

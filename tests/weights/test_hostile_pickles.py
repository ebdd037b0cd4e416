"""A hostile pickle in a weights file is refused with one error; nothing runs, and memory stays bounded."""

import io
import os
import pickle
import struct
import sys

import pytest

import archives
from poolformer_jax.weights import WeightsFileError
from poolformer_jax.weights.containers import pickles
from refusals import OVERHEAD, at_most, nothing_runs, read_all, refused


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
def test_a_pickle_that_calls_a_function_is_refused_and_calls_nothing(tmp_path, function, name, protocol):
    victim = tmp_path / "victim"
    pickled = pickle.dumps({"weight": Payload(function, f"touch {victim}")}, protocol)
    refused(archives.zip_archive(tmp_path / "hostile.pth", pickled, {}), f"needs {name}, .* Nothing was run")
    assert not victim.exists()


def test_a_code_object_is_refused(tmp_path):
    body = archives.call(archives.name_of("types", "CodeType"), archives.integer(0))
    path = archives.zip_archive(tmp_path / "code.pth", archives.program(archives.dict_of({"weight": body})), {})
    refused(path, r"needs types\.CodeType")


def test_a_call_of_a_string_is_refused(tmp_path):
    body = archives.call(archives.text("os.system"), archives.text("true"))
    path = archives.zip_archive(tmp_path / "call.pth", archives.program(body), {})
    refused(path, "its pickle is damaged .calls a str")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"N" + b"r" + struct.pack("<I", 0x7FFFFFFF), "state dict"),  # a memo of 2^31 entries
        (b"\x8d" + struct.pack("<Q", 1 << 62), "claims 4611686018427387904 bytes"),
        (b"X" + struct.pack("<I", 0xFFFFFFFF), "claims 4294967295 bytes"),
        (b"\x8b" + struct.pack("<I", 0x7FFFFFFF), "claims 2147483647 bytes"),
        (b"\x96" + struct.pack("<Q", 1 << 62), "claims 4611686018427387904 bytes"),
        (b"(" * 1000 + b"t" * 1001, "damaged"),
        (b"}" + b")" + b"\x85" * 5_000 + b"Ns", "by name: an object"),  # a key that recurses
        (
            b"}" + archives.integer(sys.hash_info.modulus << 64) + b"Ns",
            "by name: an object",
        ),  # one that collides
        (b"cos\nsystem", "truncated"),
        (b"h\x05", "damaged"),
        (b"\xff", "the instruction 0xff"),
        (b"", "damaged"),
    ],
)
def test_a_pickle_with_false_sizes_or_unknown_instructions_is_refused(tmp_path, body, message):
    path = archives.zip_archive(tmp_path / "greedy.pth", archives.program(body), {})
    with nothing_runs(), at_most(OVERHEAD), pytest.raises(WeightsFileError, match=message):
        read_all(path)


def test_a_pickle_with_too_many_instructions_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_INSTRUCTIONS", 1000)
    path = archives.zip_archive(tmp_path / "endless.pth", archives.program(b"}" * 1001), {})
    refused(path, "more than 1000 instructions")


def test_a_large_argument_of_many_calls_is_not_copied_for_each(tmp_path):
    # 3,000 numbers in a list, and 1,000 torch.Size of it.
    body = b"]q\x00(" + b"K\x01" * 3_000 + b"e" + (archives.name_of("torch", "Size") + b"h\x00\x85R") * 1000
    refused(
        archives.zip_archive(tmp_path / "copies.pth", archives.program(body), {}), "builds a size from something other"
    )


def test_a_lazily_negated_tensor_is_refused(tmp_path):
    # torch.save(torch._neg_view(tensor)) writes the tensor, and beside it that its negative is meant.
    stored = archives.tensor(archives.storage("0", 2), (2,), (1,))
    meant = stored.removesuffix(b"tR") + archives.dict_of({"neg": b"\x88"}) + b"tR"
    path = archives.zip_archive(
        tmp_path / "negative.pth", archives.program(archives.dict_of({"weight": meant})), {"0": bytes(8)}
    )
    refused(path, r"a lazy view \(neg\).*resolve_neg\(\)")


def test_a_state_dict_entry_that_is_not_a_tensor_is_named(tmp_path):
    stored = archives.tensor(archives.storage("0", 2), (2,), (1,))
    body = archives.dict_of({"weight": stored, "version": archives.integer(3)})
    path = archives.zip_archive(tmp_path / "mixed.pth", archives.program(body), {"0": bytes(8)})
    refused(path, r"entries that are not tensors by name: version \(a int\)")

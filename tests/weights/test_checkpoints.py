"""The weights in a training checkpoint are found, whatever else it holds; nothing beside them is run."""

import argparse
import collections
import datetime
import enum
import pathlib
import pickle
import types

import numpy as np
import pytest

import archives
from poolformer_jax.weights import WeightsFileError, find_model_files, open_weights
from poolformer_jax.weights.containers import pickles
from poolformer_jax.weights.containers.storage import MAX_STRUCTURE
from refusals import OVERHEAD, at_most, nothing_runs, read_all

WEIGHTS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32([-1.5, 200])}


def assert_weights(path, **options):
    opened = open_weights(path, **options)
    assert opened.tensors.keys() == WEIGHTS.keys()
    for name, array in WEIGHTS.items():
        np.testing.assert_array_equal(np.asarray(opened.tensors[name]), array, strict=True)
    return opened


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "array",
    [
        *(np.arange(-3, 3).reshape(2, 3).astype(dtype) for dtype in ("f2", "f4", "f8", ">f4", "i1", "i8", "u1", "?")),
        np.asfortranarray(np.arange(24, dtype=np.float32).reshape(2, 3, 4)),
        np.array(3.5, np.float32),
        np.float64(2.5),
        np.arange(10, dtype=np.float32)[::2],
    ],
)
def test_numpy_arrays_in_a_pickle_are_read(tmp_path, array, protocol):
    path = archives.checkpoint(tmp_path / "arrays.pth", {"state_dict": {"w": array}, "epoch": 3}, protocol)
    with nothing_runs():
        read = read_all(path)["w"]
    np.testing.assert_array_equal(read, array)
    assert read.dtype == np.asarray(array).dtype.newbyteorder("=") and read.shape == np.shape(array)


def test_numpy_arrays_may_make_a_pickle_larger_than_any_other_structure(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"w{index}": rng.integers(0, 256, 1 << 20, np.uint8) for index in range(20)}
    path = archives.checkpoint(tmp_path / "large.pth", arrays)
    assert path.stat().st_size > MAX_STRUCTURE
    with at_most(3 * path.stat().st_size + OVERHEAD):
        read = read_all(path)
    assert all(np.array_equal(read[name], array) for name, array in arrays.items())


@pytest.mark.parametrize("array", [np.array(["text"]), np.array([{}, None]), np.array([1j]), np.zeros(2, "f4,i4")])
def test_numpy_arrays_without_numbers_are_named_among_weights_and_ignored_beside_them(tmp_path, array):
    with pytest.raises(WeightsFileError, match=r"needs numpy\.ndarray"):
        open_weights(archives.checkpoint(tmp_path / "weights.pth", {"w": array}))
    assert_weights(archives.checkpoint(tmp_path / "beside.pth", {"model": WEIGHTS, "more": array}))


@pytest.mark.parametrize("shape", [(7,), (2, 4), (-2, -3), (1 << 40, 0), (10**30,)])
def test_a_numpy_array_with_a_false_shape_is_refused(tmp_path, shape):
    class Forged:
        def __reduce__(self):
            function, arguments, state = np.zeros(6, np.float32).__reduce__()
            return function, arguments, (state[0], shape, *state[2:])

    path = archives.checkpoint(tmp_path / "forged.pth", {"w": Forged()})
    with nothing_runs(), at_most(OVERHEAD), pytest.raises(WeightsFileError, match=r"NumPy array|outside|expected"):
        read_all(path)


def test_one_array_under_many_names_is_refused(tmp_path):
    array = np.zeros(1 << 16, np.float32)
    path = archives.checkpoint(tmp_path / "many.pth", {f"w{index}": array for index in range(1000)})
    with at_most(OVERHEAD), pytest.raises(WeightsFileError, match="many of them share one storage"):
        read_all(path)


def test_dicts_in_dicts_in_dicts_take_time_in_proportion_to_the_file(tmp_path):
    nested = {}
    for _ in range(8):
        nested = {str(index): nested for index in range(1000)}
    assert_weights(archives.checkpoint(tmp_path / "nested.pth", {"model": WEIGHTS, "more": nested}))


def test_a_long_name_repeated_many_times_is_refused(tmp_path):
    body = archives.text("x" * 100_000) + b"\x94" + archives.text("y") + b"\x93" * 1
    path = archives.zip_archive(tmp_path / "long.pth", archives.program(body), {})
    with at_most(OVERHEAD), pytest.raises(WeightsFileError, match="not a short text"):
        read_all(path)


class Colour(enum.Enum):
    RED = 1


class HistoryBuffer:
    def __init__(self):
        self._log_history = np.array([2.3, 2.1])


class Bag(dict):
    pass


class Calls:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


BESIDE = [
    argparse.Namespace(lr=0.1, data=pathlib.PurePosixPath("/data")),
    types.SimpleNamespace(a=HistoryBuffer()),
    Colour.RED,
    HistoryBuffer(),
    {Colour.RED: HistoryBuffer()},
    Bag(a=Bag(b=1)),
    collections.Counter("abc"),
    collections.deque([1, 2]),
    datetime.datetime(2026, 1, 1),
    np.random.default_rng(0),
    np.random.RandomState(0),
    {1, 2},
    frozenset("ab"),
    slice(1, 2),
    complex(1, 2),
    bytearray(b"abc"),
    Calls(print, "this would run"),
    Calls(getattr, Calls(__import__, "os"), "system"),
]


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("beside", BESIDE, ids=lambda value: type(value).__name__)
def test_objects_of_any_class_beside_the_weights_are_ignored_and_never_run(tmp_path, capsys, beside, protocol):
    content = {"meta": beside, "state_dict": WEIGHTS, "message_hub": {"log": [beside]}}
    path = archives.checkpoint(tmp_path / "epoch_1.pth", content, protocol)
    with nothing_runs():
        opened = assert_weights(path)
    assert (opened.wrapping, opened.others) == ("state_dict", ("meta", "message_hub"))
    assert not capsys.readouterr().out


def test_an_object_among_the_weights_is_named(tmp_path):
    path = archives.checkpoint(tmp_path / "mixed.pth", {"model": {**WEIGHTS, "c": HistoryBuffer()}})
    with nothing_runs(), pytest.raises(WeightsFileError, match=r"needs .*test_checkpoints\.HistoryBuffer, .* Nothing"):
        open_weights(path)
    assert_weights(path, ignore=["c"])


@pytest.mark.parametrize(
    ("content", "wrapping"),
    [
        ({"model": {"arch": "poolformer_s12"}, "model_state_dict": WEIGHTS, "epoch": 3}, "model_state_dict"),
        ({"state_dict": {}, "model": WEIGHTS}, "model"),
        ({"config": {"model": {"depth": 3}}, "network": WEIGHTS}, "network"),
        ({"model": {"state_dict": WEIGHTS, "args": {}}, "epoch": 3}, "model.state_dict"),
        ({"optimizer": {"state": {"a": WEIGHTS["a"]}}, "generator": WEIGHTS}, "generator"),
        ({"optimizer_states": [{"state": {0: WEIGHTS}}], "state_dict": WEIGHTS}, "state_dict"),
        ({"state_dict": WEIGHTS, "model": WEIGHTS}, "state_dict"),
        (WEIGHTS, None),
    ],
)
def test_the_key_that_holds_arrays_is_taken_by_convention_first(tmp_path, content, wrapping):
    assert assert_weights(archives.checkpoint(tmp_path / "best.pth", content)).wrapping == wrapping


def test_several_sets_of_arrays_are_named(tmp_path):
    content = {"encoder": WEIGHTS, "decoder": WEIGHTS}
    with pytest.raises(WeightsFileError, match=r"several sets of arrays, none under a usual key .*: decoder, encoder"):
        open_weights(archives.checkpoint(tmp_path / "both.pth", content))
    content = {"state_dict": WEIGHTS, "model": {"other": WEIGHTS["a"]}}
    path = archives.checkpoint(tmp_path / "two.pth", content)
    with pytest.warns(UserWarning, match="several sets of arrays: model, state_dict. Reads 'state_dict'"):
        opened = open_weights(path)
    assert opened.tensors.keys() == WEIGHTS.keys()


@pytest.mark.parametrize("protocol", [2, 4])
def test_names_to_pass_over_are_patterns(tmp_path, protocol):
    more = {"criterion.weight": WEIGHTS["a"], "criterion.nested.pos": WEIGHTS["a"], "version": 3}
    path = archives.checkpoint(tmp_path / "last.ckpt", {"state_dict": {**WEIGHTS, **more}}, protocol)
    with pytest.raises(WeightsFileError, match=r"version \(a int\)\. To leave them out, pass ignore=\[...\] "):
        open_weights(path)
    assert_weights(path, ignore=["criterion.*", "version"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"module": {"a": np.zeros(0, np.float32)}, "ds_version": "0.16"}, "one shard of a DeepSpeed .*zero_to_fp32"),
        ({"optimizer_state_dict": {"zero_stage": 2}}, "one shard of a DeepSpeed checkpoint"),
        ({"model": {"_flat_param": WEIGHTS["a"]}}, r"one shard of a distributed checkpoint \(FSDP"),
    ],
)
def test_shards_of_distributed_training_are_named(tmp_path, content, message):
    with pytest.raises(WeightsFileError, match=message):
        open_weights(archives.checkpoint(tmp_path / "rank_0.pt", content))


def test_the_one_ckpt_file_of_a_folder_is_taken_and_several_are_named(tmp_path):
    archives.checkpoint(tmp_path / "epoch=3-step=10.ckpt", {"state_dict": WEIGHTS})
    (tmp_path / "hparams.yaml").write_text("lr: 0.1")
    assert_weights(find_model_files(tmp_path).weights)
    archives.checkpoint(tmp_path / "last.ckpt", {"state_dict": WEIGHTS})
    with pytest.raises(ValueError, match=r"several weights files: epoch=3-step=10.ckpt, last.ckpt"):
        find_model_files(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"),
    [("__0_0.distcp", "dcp_to_torch"), ("zero_to_fp32.py", "DeepSpeed")],
)
def test_a_folder_of_shards_is_named(tmp_path, file, message):
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        find_model_files(tmp_path)


def test_the_instruction_limit_holds_for_objects_that_are_ignored(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_INSTRUCTIONS", 100)
    content = pickle.dumps({"model": WEIGHTS, "more": [HistoryBuffer() for _ in range(50)]}, 2)
    with pytest.raises(WeightsFileError, match="more than 100 instructions"):
        open_weights(archives.zip_archive(tmp_path / "long.pth", content, {}))

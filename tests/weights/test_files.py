"""Weights files written by PyTorch are read exactly; fixtures/make_torch_files.py wrote them."""

import json
import shutil
import struct

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import archives
from golden.fixture_values import parameter
from paths import TESTS
from poolformer_jax.weights import WeightsFileError, find_model_files, from_torch_state_dict, open_weights
from poolformer_jax.weights.containers import torch_files

FIXTURES = TESTS / "fixtures"


def read(path, **options):
    return {name: np.asarray(tensor) for name, tensor in open_weights(path, **options).tensors.items()}


def assert_values_follow_from_names(tensors, prefix="", name_of=lambda name: name):
    assert len(tensors) > 50
    for name, array in tensors.items():
        expected = parameter(prefix + name_of(name), array.shape).astype(array.dtype)
        np.testing.assert_array_equal(array, expected, strict=True)


@pytest.mark.parametrize(
    ("file", "container"),
    [
        ("hf.bin", "torch zip"),
        ("hf_protocol4.bin", "torch zip"),
        ("hf_no_checksum.bin", "torch zip"),
        ("hf_sharded/model.safetensors.index.json", "sharded safetensors"),
        ("timm_float16.pth", "torch zip"),
        ("timm_bfloat16.pth", "torch zip"),
        ("timm_float64.pth", "torch zip"),
        ("timm_float16_legacy.pth", "torch legacy"),
        ("timm_bfloat16_legacy.pth", "torch legacy"),
        ("timm_float64_legacy.pth", "torch legacy"),
    ],
)
def test_every_container_and_type_reads_as_pytorch_wrote_it(file, container):
    opened = open_weights(FIXTURES / file)
    assert (opened.container, opened.wrapping, opened.has_ema) == (container, None, False)
    types = {tensor.dtype.name for tensor in opened.tensors.values()}
    assert types == {next((name for name in ("bfloat16", "float16", "float64") if f"_{name}" in file), "float32")}
    assert_values_follow_from_names(read(FIXTURES / file))


@pytest.mark.parametrize("file", ["views.pth", "views_legacy.pth"])
def test_views_of_a_storage_keep_their_values(file):
    tensors = read(FIXTURES / file)
    base = np.arange(24, dtype=np.float32)
    expected = {
        "transposed": base.reshape(2, 3, 4).T,
        "channels_last": base.reshape(1, 2, 3, 4),
        "first_half": np.arange(5, dtype=np.float32),
        "second_half": np.arange(5, 10, dtype=np.float32),
        "every_other": np.arange(0, 10, 2, dtype=np.float32),
        "scalar": np.array(7, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "parameter": np.ones(2, np.float32),
        "steps": np.array(41, np.int64),
    }
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[name], array, strict=True)


@pytest.mark.parametrize("file", ["timm_checkpoint.pth.tar", "sail_checkpoint_legacy.pth.tar"])
def test_a_training_checkpoint_gives_its_weights_or_their_moving_average(file):
    opened = open_weights(FIXTURES / file)
    assert (opened.wrapping, opened.has_ema) == ("state_dict", True)
    assert set(opened.others) == {"epoch", "arch", "optimizer", "version", "args", "state_dict_ema", "metric"}
    assert_values_follow_from_names(read(FIXTURES / file))
    assert_values_follow_from_names(read(FIXTURES / file, use_ema=True), prefix="ema.")


@pytest.mark.parametrize(
    ("file", "layout_name"),
    [
        ("hf.bin", "poolformer.encoder.block.2.1.output.conv1.weight"),
        ("hf_parallel.bin", "module.poolformer.encoder.block.2.1.output.conv1.weight"),
        ("timm_float64.pth", "stages.2.blocks.1.mlp.fc1.weight"),
        ("timm_checkpoint.pth.tar", "stages.2.blocks.1.mlp.fc1.weight"),
        ("sail_checkpoint_legacy.pth.tar", "network.4.1.mlp.fc1.weight"),
    ],
)
def test_the_network_of_a_file_is_inferred(file, layout_name):
    config, variables = from_torch_state_dict(open_weights(FIXTURES / file).tensors)
    assert (config.depths, config.hidden_sizes, config.num_labels) == ((1, 1, 2, 1), (2, 4, 6, 8), 3)
    kernel = variables["params"]["stages_2"]["blocks_1"]["mlp"]["fc1"]["kernel"]
    expected = parameter(layout_name.removeprefix("module."), (24, 6, 1, 1))[:, :, 0, 0].T
    np.testing.assert_array_equal(kernel, expected, strict=True)


def test_bfloat16_and_float16_become_float32_without_a_change_of_value():
    for name, dtype in (("float16", np.float16), ("bfloat16", jnp.bfloat16)):
        _, variables = from_torch_state_dict(open_weights(FIXTURES / f"timm_{name}.pth").tensors)
        expected = parameter("stem.conv.bias", (2,)).astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(variables["params"]["stem"]["conv"]["bias"], expected, strict=True)


def test_a_safetensors_file_reads_in_every_type(tmp_path):
    arrays = {
        "single": np.arange(6, dtype=np.float32).reshape(2, 3),
        "double": np.arange(3.0),
        "half": np.ones((2, 2), np.float16),
        "brain": np.array([1.5, -2.0], jnp.bfloat16),
        "scalar": np.array(3, np.int64),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "some.safetensors", metadata={"format": "pt"})
    opened = open_weights(tmp_path / "some.safetensors")
    assert (opened.container, opened.metadata) == ("safetensors", {"format": "pt"})
    for name, array in arrays.items():
        np.testing.assert_array_equal(np.asarray(opened.tensors[name]), array, strict=True)


@pytest.mark.parametrize(("order", "dtype"), [(None, "<f4"), (b"little", "<f4"), (b"big", ">f4")])
def test_both_byte_orders_are_read(tmp_path, order, dtype):
    values = np.array([1.5, -2.0, 3.25], np.float32)
    pickled = archives.program(archives.dict_of({"w": archives.tensor(archives.storage("0", 3), (3,), (1,))}))
    stored = {"0": values.astype(dtype).tobytes()}
    archives.zip_archive(tmp_path / "some.pth", pickled, stored, order=order)
    np.testing.assert_array_equal(read(tmp_path / "some.pth")["w"], values, strict=True)
    assert open_weights(tmp_path / "some.pth").tensors["w"].dtype.name == "float32"


def test_the_name_of_a_file_does_not_decide_how_it_is_read(tmp_path):
    shutil.copy(FIXTURES / "hf.bin", tmp_path / "weights.pth.tar")
    shutil.copy(FIXTURES / "timm_float16_legacy.pth", tmp_path / "weights")
    assert open_weights(tmp_path / "weights.pth.tar").container == "torch zip"
    assert open_weights(tmp_path / "weights").container == "torch legacy"


def test_sharded_torch_files_are_read_through_their_index(tmp_path):
    shutil.copy(FIXTURES / "hf.bin", tmp_path / "pytorch_model-00001-of-00001.bin")
    names = open_weights(FIXTURES / "hf.bin").tensors
    index = {"weight_map": dict.fromkeys(names, "pytorch_model-00001-of-00001.bin")}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    opened = open_weights(tmp_path / "pytorch_model.bin.index.json")
    assert opened.container == "sharded torch"
    assert opened.tensors.keys() == names.keys()


def test_a_sharded_fp16_variant_of_transformers_is_read(tmp_path):
    index = json.loads((FIXTURES / "hf_sharded" / "model.safetensors.index.json").read_text())
    renamed = {shard: shard.replace("model-", "model.fp16-") for shard in index["weight_map"].values()}
    for shard, name in renamed.items():
        shutil.copy(FIXTURES / "hf_sharded" / shard, tmp_path / name)
    index["weight_map"] = {name: renamed[shard] for name, shard in index["weight_map"].items()}
    (tmp_path / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    found = find_model_files(tmp_path).weights
    assert found.name == "model.safetensors.index.fp16.json"
    assert open_weights(found).tensors.keys() == index["weight_map"].keys()


@pytest.mark.parametrize("beside", [archives.dict_of({"decay": archives.integer(1)}), b"}"])
def test_a_moving_average_consists_of_arrays(tmp_path, beside):
    weights = archives.dict_of({"weight": archives.tensor(archives.storage("0", 2), (2,), (1,))})
    body = archives.program(archives.dict_of({"model": weights, "ema": beside}))
    path = archives.zip_archive(tmp_path / "last.pth", body, {"0": bytes(8)})
    assert not open_weights(path).has_ema
    with pytest.raises(WeightsFileError, match="no moving average of the weights, only ema, model"):
        open_weights(path, use_ema=True)


@pytest.mark.parametrize(
    "beside",
    [
        *(archives.name_of("torch", name) for name in ("int8", "int32", "uint16", "complex64", "float8_e4m3fn")),
        archives.call(archives.name_of("torch.serialization", "_get_layout"), archives.text("torch.strided")),
        archives.call(archives.name_of("torch.torch_version", "TorchVersion"), archives.text("2.13.0")),
        archives.call(archives.name_of("__builtin__", "bytearray")),
        b"}(" + archives.tuple_of(archives.integer(1)) + b"N" + archives.name_of("torch", "int8") + b"Nu",
    ],
)
def test_other_contents_of_a_checkpoint_are_ignored(tmp_path, beside):
    weights = archives.dict_of({"weight": archives.tensor(archives.storage("0", 2), (2,), (1,))})
    body = archives.program(archives.dict_of({"state_dict": weights, "more": beside}))
    path = archives.zip_archive(tmp_path / "last.pth", body, {"0": bytes(8)})
    assert (list(open_weights(path).tensors), open_weights(path).others) == (["weight"], ("more",))


def test_a_legacy_file_of_pickle_protocol_4_is_recognised(tmp_path):
    content = (FIXTURES / "timm_float16_legacy.pth").read_bytes()
    number = torch_files.LEGACY_MAGIC
    begin = b"\x80\x02" + number
    assert content.startswith(begin)
    frame = struct.pack("<Q", len(number))
    (tmp_path / "weights.pth").write_bytes(b"\x80\x04\x95" + frame + number + content[len(begin) :])
    assert open_weights(tmp_path / "weights.pth").container == "torch legacy"


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("hf.bin", {"use_ema": True}, "no moving average of the weights"),
        ("torchscript.pt", {}, "TorchScript program. Save the state dict"),
        ("whole_model.bin", {}, r"needs torch\.nn\.modules\.linear\.Linear, .* save model\.state_dict\(\) alone"),
        ("hf_sharded/config.json", {}, "begins with .* expected a safetensors file or one that torch.save wrote"),
    ],
)
def test_files_without_a_state_dict_are_refused_with_advice(file, options, message):
    with pytest.raises(WeightsFileError, match=message) as raised:
        open_weights(FIXTURES / file, **options)
    assert str(FIXTURES / file) in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", "Run: git lfs pull"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "it is a web page"),
    ],
)
def test_failed_downloads_are_recognised(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsFileError, match=message):
        open_weights(tmp_path / "model.safetensors")


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*nothing\.pth"):
        open_weights(tmp_path / "nothing.pth")

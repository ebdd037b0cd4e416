"""Text of any file reaches a person short, without control characters, and costs no more than the file."""

import json
import pickle
import struct
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import archives
from poolformer_jax import PoolFormerConfig, PoolFormerImageProcessor
from poolformer_jax.errors import PoolFormerError
from poolformer_jax.images import ImageError, read_image
from poolformer_jax.messages import MAX_MESSAGE, csv_cell, printable, printable_message, short_repr
from poolformer_jax.weights import find_model_files, identify_model, open_weights
from refusals import OVERHEAD, at_most
from train.config import TrainConfig
from train.data.sources.class_map import read_class_map
from train.resume.same_run import read_recipe

CHEAP = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))

# Texts as a hostile file has them: escapes for terminals, directions, lone surrogates, lines, lengths.
TEXTS = st.one_of(
    st.text(max_size=30),
    st.text(st.sampled_from("\x1b[2J\n\r\0\x7f\x9b\u202e\ud800a"), max_size=20),
    st.builds(str.__mul__, st.sampled_from(["a", "\x1b", "\U0010ffff", "a.", "/"]), st.integers(1, 20_000)),
)
SCALARS = st.one_of(TEXTS, st.none(), st.booleans(), st.floats(), st.integers(), st.sampled_from([1e308, 10**4299]))
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


def shared(levels: int, container: type) -> object:
    """2**levels texts that take a few bytes for each level, because every level holds the one below twice."""
    value: object = container(["\x1b[31m" * 4])
    for _ in range(levels):
        value = container([value, value])
    return value


# What a pickle can hold: shared, deep, and simple values.
PICKLED = st.one_of(
    SCALARS,
    st.builds(int.__lshift__, st.sampled_from([1, -1]), st.just(20_000)),  # repr() refuses it
    st.builds(shared, st.integers(0, 90), st.sampled_from([list, tuple])),
    st.binary(max_size=30),
)


def check(message: str) -> None:
    assert len(message) <= MAX_MESSAGE
    assert all(line.isprintable() for line in message.split("\n")), message


@contextmanager
def short_messages(size: int = 0):
    """Fails if the block raises anything but a short error, warns at length, or takes memory beyond the file's."""
    with warnings.catch_warnings(record=True) as caught, at_most(40 * size + OVERHEAD):
        warnings.simplefilter("always")
        try:
            yield
        except (PoolFormerError, ValueError) as error:
            assert isinstance(error, PoolFormerError), repr(error)
            check(str(error))
    for warning in caught:
        check(str(warning.message))


def pickled(value: object) -> bytes:
    """The value as instructions without the protocol and STOP; the values that a memo shares stay shared."""
    return pickle.dumps(value, 2)[2:-1]


@CHEAP
@given(PICKLED)
def test_a_value_of_a_file_is_shortened(value):
    with at_most(OVERHEAD):
        text = short_repr(value)
    assert len(text) <= 400
    check(text)


@CHEAP
@given(TEXTS, st.integers(10, 200))
def test_a_text_of_a_file_is_shortened_and_escaped(text, limit):
    assert len(printable(text, limit)) <= limit
    assert printable(text, limit).isprintable()
    message = printable_message(text)
    check(message)
    assert printable_message(message) == message


def test_a_message_keeps_its_lines_and_its_end():
    message = printable_message("\x1b[31mwrong:\n" + "x" * 10_000 + "\nExpected a name.")
    assert message.startswith("\\x1b[31mwrong:\nxxx")
    assert message.endswith("Expected a name.")


def test_a_deep_value_is_shortened():
    value: object = ()
    for _ in range(100_000):
        value = (value,)
    assert short_repr(value) == "(((...),),)"


MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
# Places of a torch.save file where a value of the pickle could reach a message.
WEIGHT = archives.tensor(archives.storage("0", 2), (2,), (1,))


def at_key(value: bytes) -> bytes:
    return b"}(" + value + WEIGHT + b"u"


def _reference(kind: bytes, key: bytes, count: bytes) -> bytes:
    return archives.tuple_of(archives.text("storage"), kind, key, archives.text("cpu"), count) + b"Q"


FLOAT, KEY, TWO = archives.name_of("torch", "FloatStorage"), archives.text("0"), archives.integer(2)
REBUILD = archives.name_of("torch._utils", "_rebuild_tensor_v2")
PLACES = {
    "the whole": lambda value: value,
    "a key": at_key,
    "a value": lambda value: archives.dict_of({"weight": value}),
    "an architecture": lambda value: archives.dict_of({"arch": value, "state_dict": archives.dict_of({"w": WEIGHT})}),
    "a key of a checkpoint": lambda value: b"}(" + value + archives.dict_of({"w": WEIGHT}) + b"u",
    "a storage's type": lambda value: _reference(value, KEY, TWO),
    "a storage's key": lambda value: _reference(FLOAT, value, TWO),
    "a storage's length": lambda value: _reference(FLOAT, KEY, value),
    "a shape": lambda value: archives.call(REBUILD, archives.storage("0", 2), b"K\0", value, value, b"\x89"),
    "an offset": lambda value: archives.call(REBUILD, archives.storage("0", 2), value, b"K\1\x85", b"K\1\x85", b"\x89"),
    "a size": lambda value: archives.call(archives.name_of("torch", "Size"), value),
    "a name": lambda value: value + archives.text("name") + b"\x93)R",
    "a class": lambda value: archives.text("a") + value + b"\x93)R",
    "a call": lambda value: archives.call(value),
    "a memo": lambda value: value + b"q\xff" + b"h\xff",
    "a NumPy type": lambda value: archives.dict_of({"w": archives.call(archives.name_of("numpy", "dtype"), value)}),
    "a NumPy array": lambda value: archives.dict_of(
        {
            "w": archives.call(
                archives.name_of("numpy._core.numeric", "_frombuffer"),
                value,
                archives.call(archives.name_of("numpy", "dtype"), archives.text("f4")),
                value,
            )
        }
    ),
}


@CHEAP
@given(PICKLED, st.sampled_from(sorted(PLACES)))
def test_a_pickle_with_shared_parts_gets_a_short_message(tmp_path, value, place):
    program = archives.program(PLACES[place](pickled(value)))
    path = archives.zip_archive(tmp_path / "hostile.pth", program, {"0": bytes(8)})
    with short_messages(path.stat().st_size):
        open_weights(path)


@CHEAP
@given(PICKLED, st.sampled_from(["version", "system", "keys", "result"]))
def test_a_legacy_file_with_shared_parts_gets_a_short_message(tmp_path, value, place):
    simple = {"magic": MAGIC, "version": 1001, "system": {}, "result": None, "keys": ["0"]}
    parts = {name: pickle.dumps(part, 2) for name, part in simple.items()}
    parts["result"] = archives.program(archives.dict_of({"weight": WEIGHT}))
    parts[place] = pickle.dumps([value] if place == "keys" else value, 2)
    path = tmp_path / "hostile.pth"
    path.write_bytes(b"".join(parts.values()) + struct.pack("<Q", 2) + bytes(8))
    with short_messages(path.stat().st_size):
        open_weights(path)


def test_343_bytes_of_nested_lists_as_a_version_are_refused_at_once(tmp_path):
    # The "billion laughs": 2**30 lists, each level holding the one below twice.
    doubled = b"]q\x00" + b"".join(b"](h" + bytes([n]) + b"h" + bytes([n]) + b"eq" + bytes([n + 1]) for n in range(30))
    path = tmp_path / "laughs.pth"
    magic = pickle.dumps(MAGIC, 2)
    path.write_bytes(magic + archives.program(doubled) + pickle.dumps({}, 2))
    with at_most(OVERHEAD), pytest.raises(PoolFormerError, match="legacy format has version") as error:
        open_weights(path)
    check(str(error.value))


DTYPES = st.sampled_from(["F32", "F8_E4M3", "I64", "nonsense", "\x1b"])


@CHEAP
@given(st.dictionaries(TEXTS.filter(lambda text: text != "__metadata__"), DTYPES, max_size=4), TEXTS)
def test_a_safetensors_header_gets_a_short_message(tmp_path, dtypes, metadata):
    sizes = {"F32": 4, "I64": 8}
    header, begin = {"__metadata__": {"poolformer_jax.config": metadata}}, 0
    for name, dtype in dtypes.items():
        end = begin + sizes.get(dtype, 1)
        header[name] = {"dtype": dtype, "shape": [1], "data_offsets": [begin, end]}
        begin = end
    encoded = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(begin))
    with short_messages(path.stat().st_size):
        identify_model(find_model_files(path), open_weights(path))


CONFIG_FIELDS = (
    "model_type architecture architectures num_labels id2label label2id depths hidden_sizes hidden_act norm pool_size "
    "padding problem_type num_encoder_blocks pretrained_cfg label_names model_args global_pool num_classes"
)
CONFIGS = st.dictionaries(st.sampled_from(CONFIG_FIELDS.split()) | TEXTS, JSON, max_size=5)


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


@CHEAP
@given(CONFIGS, st.booleans())
def test_a_config_gets_a_short_message(tmp_path, data, ours):
    if ours:
        data = {"model_type": "poolformer", **data}
    path = write_json(tmp_path / "config.json", data)
    with short_messages(path.stat().st_size):
        PoolFormerConfig.from_pretrained(path)


@CHEAP
@given(CONFIGS, st.booleans())
def test_a_config_beside_weights_gets_a_short_message(tmp_path, data, timms):
    if timms:
        data = {"architecture": "poolformer_s12", **data}
    path = write_json(tmp_path / "config.json", data)
    archives.one_tensor(tmp_path / "model.pth")
    with short_messages(path.stat().st_size):
        files = find_model_files(tmp_path)
        identify_model(files, open_weights(files.weights))


CONFIG_SIZES = [
    *("num_channels", "depths", "hidden_sizes", "mlp_ratio", "pool_size", "patch_sizes", "strides", "padding"),
    *("num_labels", "dropout_rate", "image_size"),
]


@pytest.mark.parametrize("field", CONFIG_SIZES)
def test_a_size_that_no_network_has_is_refused(field):
    for number in (10**9, 10**400, -(10**400), 1e308):
        for value in (number, [number] * 4):
            with at_most(OVERHEAD), pytest.raises(PoolFormerError) as error:
                PoolFormerConfig.from_dict({"model_type": "poolformer", field: value})
            assert field in str(error.value)
            check(str(error.value))


def test_mixers_with_a_parameter_for_every_pair_of_positions_take_small_images():
    for mixer in ("spatial_fc", "random"):
        assert PoolFormerConfig(image_size=512, token_mixers=(mixer,) * 4).image_size == 512
        with pytest.raises(PoolFormerError, match="at most 16,384 positions"):
            PoolFormerConfig(image_size=4096, token_mixers=(mixer,) * 4)


@pytest.mark.parametrize("field", ["size", "crop_size", "crop_pct", "rescale_factor", "image_mean", "image_std"])
@pytest.mark.parametrize("value", [10**400, [10**400] * 3, {"height": 10**400, "width": 10**400}])
def test_a_size_that_no_picture_has_is_refused(field, value):
    with at_most(OVERHEAD), pytest.raises(PoolFormerError) as error:
        PoolFormerImageProcessor.from_dict({field: value})
    check(str(error.value))


@pytest.mark.parametrize(
    "values", [{"image_std": [0.2, 0.2, 1e-45]}, {"image_std": 1e308}, {"image_mean": 1e20}, {"rescale_factor": 1e-40}]
)
def test_normalisation_that_leaves_no_picture_is_refused(values):
    with pytest.raises(PoolFormerError, match="with which black and white stay apart"):
        PoolFormerImageProcessor.from_dict(values)


@pytest.mark.parametrize("values", [{"data": {"seed": 10**400}}, {"optimizer": {"learning_rate": 10**400}}])
def test_a_number_that_no_recipe_has_is_refused(values):
    with pytest.raises(PoolFormerError) as error:
        TrainConfig.from_dict(values)
    check(str(error.value))


PROCESSOR_FIELDS = (
    "size crop_size crop_pct resample image_mean image_std rescale_factor do_resize image_processor_type interpolation "
    "input_size mean std crop_mode do_resize_and_center_crop"
)


@CHEAP
@given(st.dictionaries(st.sampled_from(PROCESSOR_FIELDS.split()) | TEXTS, JSON, max_size=5))
def test_a_preprocessor_config_gets_a_short_message(tmp_path, data):
    path = write_json(tmp_path / "preprocessor_config.json", data)
    with short_messages(path.stat().st_size):
        PoolFormerImageProcessor.from_pretrained(tmp_path)


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=60)


@CHEAP
@given(NAMES, st.binary(max_size=40))
def test_an_image_name_gets_a_short_message(tmp_path, name, content):
    try:
        (tmp_path / name).write_bytes(content)
    except OSError:
        return
    with pytest.raises(ImageError) as error:
        read_image(tmp_path / name)
    check(str(error.value))


@CHEAP
@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_a_recipe_gets_a_short_message(tmp_path, caplog, content):
    path = tmp_path / "recipe.json"
    path.write_bytes(content)
    with short_messages(len(content)):
        assert isinstance(read_recipe(path), dict)
    for record in caplog.records:
        check(record.getMessage())


@CHEAP
@given(
    st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()) | st.just(b"[" * 100_000),
    st.sampled_from(["map.json", "map.txt"]),
)
def test_a_class_map_gets_a_short_message(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with suppress(PoolFormerError):
        read_class_map(tmp_path / name)  # imports what it needs, which takes memory once
    with short_messages(len(content)):
        read_class_map(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("@SUM(1)", "'@SUM(1)"),
        ("-x", "'-x"),
        ("-1", "-1"),
        ("+0.5", "+0.5"),
        ("a=\n\x1b", "a=\\n\\x1b"),
    ],
)
def test_a_spreadsheet_computes_no_name_of_a_table(text, cell):
    assert csv_cell(text) == cell

"""Any bytes in a weights file are read or refused; nothing runs, and memory stays in proportion to the file."""

import pickletools
import shutil
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import archives
from paths import TESTS
from poolformer_jax.weights import WeightsFileError
from refusals import OVERHEAD, at_most, nothing_runs, read_all

FIXTURES = TESTS / "fixtures"


def opens_or_is_refused(path):
    with nothing_runs(), at_most(path.stat().st_size * 3 + OVERHEAD):
        try:
            read_all(path)
        except WeightsFileError:
            return


FUZZ = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
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

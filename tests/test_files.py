"""Files and model folders are whole after an I/O error, a kill and a loss of power, and nothing temporary stays."""

import itertools
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from faults import Disk, failing
from paths import ROOT
from poolformer_jax import PoolFormerForImageClassification, load_pretrained, save_pretrained
from poolformer_jax.files import write_json
from saved_models import CONFIG, PROCESSOR, make_variables, same, save

# Waits inside of the block that writes, until it is killed.
WRITER = """
import sys, time
from pathlib import Path
from poolformer_jax.files import replace_atomically
with replace_atomically(Path(sys.argv[1])) as temporary:
    temporary.write_text("half of i")
    print("writing", flush=True)
    time.sleep(600)
"""


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def start_a_writer(path: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", WRITER, path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    return process


def test_the_next_write_clears_what_a_killed_program_left_and_no_others(tmp_path):
    killed, running = (start_a_writer(tmp_path / "a.json") for _ in range(2))
    try:
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        assert len(list(tmp_path.iterdir())) == 2
        write_json(tmp_path / "b.json", {})
        assert sorted(content(tmp_path)) == [f"{next(tmp_path.glob('.*')).name}/a.json", "b.json"]
    finally:
        running.kill()
        running.communicate()
    write_json(tmp_path / "b.json", {})
    assert sorted(content(tmp_path)) == ["b.json"]


def test_a_staging_folder_of_a_stranger_reads_and_removes_nothing_outside(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "model"
    for path in (outside / "secret", outside / "model" / "x", outside / "old" / "y", outside / "names" / "z"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("dear to me")
    before = content(outside)
    save(folder)
    (folder / ".poolformer-jax-1").symlink_to(outside)
    (folder / ".poolformer-jax-2").mkdir()
    for part in ("model", "old", "names"):
        (folder / ".poolformer-jax-2" / part).symlink_to(outside / part)
    save(folder)
    assert content(outside) == before
    assert not (folder / "y").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="finds the names of open files in /proc")
def test_a_loss_of_power_drops_nothing_that_has_its_name(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    write_json(tmp_path / "a.json", {"a": 1})
    for _ in range(2):  # a new folder, and one that is replaced
        save(tmp_path / "model", image_processor=PROCESSOR)
        disk.check(tmp_path / "model")
    assert {path.name for path in disk.renamed} >= {"a.json", "model", "config.json", "flax_model.safetensors"}
    assert disk.synced[tmp_path.stat().st_ino] is not None


def save_scaled(folder, factor):
    variables = jax.tree.map(lambda array: array * np.float32(factor), make_variables(CONFIG))
    save_pretrained(folder, PoolFormerForImageClassification(CONFIG), variables, image_processor=PROCESSOR)
    return variables


@pytest.mark.slow
@pytest.mark.parametrize("replaces", [False, True])
def test_an_error_at_any_call_while_a_model_is_saved_loses_nothing(tmp_path, replaces):
    for number in itertools.count(1):
        folder = tmp_path / f"{number}" / "model"
        folder.parent.mkdir()
        if replaces:
            save_scaled(folder, 1)
        before = content(folder)
        with failing(tmp_path, number) as faults:
            try:
                new = save_scaled(folder, 2)
            except OSError as raised:
                error = str(raised)
            else:
                error = None
        if error is not None:
            assert error.startswith(f"Cannot write {folder}: Input/output error.")
            assert "\n" not in error
            left = {name: value for name, value in content(folder).items() if "/" not in name}
            assert left == before or load_pretrained(folder)  # the old model, or after the last call the new one
            new = save_scaled(folder, 2)
        assert same(load_pretrained(folder)[1], new)
        save_scaled(folder, 2)  # removes what an error in the clean-up left
        assert not list(folder.parent.rglob(".poolformer-jax-*"))
        if not faults.happened:
            break
    assert number > 20


# Saves a model over another one, and kills itself before the n-th move of a file.
KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, "tests")
from saved_models import save
folder, moves, move = Path(sys.argv[1]), int(sys.argv[2]), Path.replace
def replace(path, target):
    global moves
    if folder in (path.parent, target.parent):
        moves -= 1
        if moves < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return move(path, target)
Path.replace = replace
save(folder)
"""


@pytest.mark.slow
@pytest.mark.parametrize("moves", [0, 1, 3, 4, 6])
def test_the_next_save_clears_what_a_killed_one_left_and_the_old_model_is_not_lost(tmp_path, moves):
    folder = tmp_path / "model"
    old = save_scaled(folder, 3)
    before = content(folder)
    killed = subprocess.run([sys.executable, "-c", KILLED, folder, str(moves)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(folder.glob(".poolformer-jax-*"))
    with pytest.raises(OSError, match="Cannot write"), failing(folder, 30) as faults:
        save_scaled(folder, 4)
    assert faults.happened
    assert same(load_pretrained(folder)[1], old)
    assert {name: value for name, value in content(folder).items() if "/" not in name} == before
    save_scaled(folder, 4)
    assert sorted(content(folder)) == sorted(before)


def test_a_model_is_not_saved_in_place_of_a_file(tmp_path):
    (tmp_path / "notes").write_text("kept")
    with pytest.raises(OSError, match="Expected a name that no file has"):
        save(tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "kept"

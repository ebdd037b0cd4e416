"""A saved state is restored bit for bit, on any devices, or reported as damaged."""

import itertools
import json
import logging
import os
import random
import shutil
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from faults import failing
from poolformer_jax.errors import InputError
from selection import slow_after
from train.compute.state import TrainState
from train.resume.checkpoints import CheckpointError, Checkpoints, newest_run
from train.resume.record import _checksum
from training import disk, first_state, open_and_make_parts, sharded, tiny

RUN = {"classes": ["ant", "bee"], "recipe": {}, "network": {}}


@pytest.fixture(scope="module")
def parts():
    _, parts = open_and_make_parts(tiny(mesh=sharded(1, 1)), jax.devices()[:1])
    return parts


@pytest.fixture(scope="module")
def states() -> list[TrainState]:
    """States of steps 1, 2 and 3 that differ in every array."""
    state = first_state(tiny(mesh=sharded(1, 1)))
    return [_of_step(state, number) for number in (1, 2, 3)]


def _of_step(state: TrainState, number: int) -> TrainState:
    moved = jax.tree.map(lambda leaf: leaf + jnp.asarray(number, leaf.dtype), state)
    return moved.replace(skipped=jnp.int32(number % 2), skipped_in_a_row=jnp.int32(0))


def open_in(folder: Path, keep: int = 3) -> Checkpoints:
    return Checkpoints(folder, RUN, keep)


def save(folder: Path, states: list[TrainState], keep: int = 3) -> None:
    with open_in(folder, keep) as checkpoints:
        for state in states:
            checkpoints.save(state)


def assert_equal(left: TrainState, right: TrainState) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), left, right)


def data_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def test_a_state_comes_back_bit_for_bit(tmp_path, parts, states):
    save(tmp_path, states)
    with open_in(tmp_path) as checkpoints:
        assert checkpoints.steps == [1, 2, 3]
        assert_equal(checkpoints.restore(parts.abstract_state), states[-1])


@pytest.mark.slow
def test_an_error_at_any_call_while_a_state_is_saved_loses_none_before_it(tmp_path, parts, states, monkeypatch):
    # How long Orbax's threads wait for one that has failed, and the interpreter for them when it exits.
    monkeypatch.setattr("orbax.checkpoint._src.multihost.multihost.coordination_timeout", lambda: 5)
    save(tmp_path / "first", states[:1])
    for number in itertools.count(1, step=3):  # the calls of each array are alike
        folder = tmp_path / f"{number}"
        shutil.copytree(tmp_path / "first", folder)
        with failing(folder, number) as faults:
            try:
                with open_in(folder) as checkpoints:
                    checkpoints.save(states[1], last=True)
            except (CheckpointError, OSError) as raised:
                error = str(raised)
            else:
                error = None
        assert error is None or "Input/output error" in error
        if error is not None:
            time.sleep(0.2)  # TensorStore's threads may still write; a program would have ended
        with open_in(folder) as checkpoints:
            kept = checkpoints.restore(parts.abstract_state)
            checkpoints.save(states[2], last=True)
        assert_equal(kept, states[0] if int(kept.step) == 1 else states[1])
        assert error is not None or int(kept.step) == 2
        assert not list(folder.glob("*tmp*"))
        if not faults.happened:
            break
    assert number > 10


def test_an_empty_folder_has_no_state(tmp_path, parts):
    with open_in(tmp_path / "new") as checkpoints:
        assert checkpoints.restore(parts.abstract_state) is None


def test_only_the_newest_states_are_kept(tmp_path, states):
    save(tmp_path, states, keep=2)
    with open_in(tmp_path) as checkpoints:
        assert checkpoints.steps == [2, 3]


@pytest.mark.slow
def test_a_state_of_eight_devices_is_restored_on_one_and_four(tmp_path, states):
    _, eight = open_and_make_parts(tiny(mesh=sharded(4, 2)))
    spread = jax.device_put(states[0], jax.tree.map(lambda leaf: leaf.sharding, eight.abstract_state))
    save(tmp_path, [spread])
    for count, mesh in ((1, sharded(1, 1)), (4, sharded(2, 2))):
        _, fewer = open_and_make_parts(tiny(mesh=mesh), jax.devices()[:count])
        with open_in(tmp_path) as checkpoints:
            restored = checkpoints.restore(fewer.abstract_state)
        assert_equal(restored, states[0])
        kernel = restored.params["stages_0"]["blocks_0"]["mlp"]["fc1"]["kernel"]
        assert len(kernel.sharding.device_set) == count


def damage(path: Path, kind: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        content = content[: len(content) // 2]
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("kind", ["truncated", "bit-flipped"])
def test_a_damaged_newest_state_falls_back_to_the_one_before_and_says_so(tmp_path, parts, states, kind, caplog):
    save(tmp_path, states[:2])
    rng = random.Random(0)
    # The largest files hold the arrays.
    for path in sorted(data_files(tmp_path / "2"), key=lambda path: path.stat().st_size)[-2:]:
        damage(path, kind, rng)
    with caplog.at_level(logging.WARNING), open_in(tmp_path) as checkpoints:
        assert_equal(checkpoints.restore(parts.abstract_state), states[0])
        assert "The checkpoint of step 2 is damaged" in caplog.text
        assert (tmp_path / "damaged" / "2").is_dir()
        # The run resumes from step 1 and saves step 2 again.
        checkpoints.save(states[1], last=True)
        assert checkpoints.steps == [1, 2]


@pytest.mark.parametrize("seed", slow_after(2, range(6)))
def test_a_flipped_bit_anywhere_never_gives_another_state(tmp_path, parts, states, seed):
    save(tmp_path, states[:2])
    rng = random.Random(seed)
    damage(rng.choice(data_files(tmp_path / "2")), "bit-flipped", rng)
    with open_in(tmp_path) as checkpoints:
        restored = checkpoints.restore(parts.abstract_state)
    assert_equal(restored, states[int(restored.step) - 1])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
@pytest.mark.parametrize("name", ["step/metadata", "params/manifest.ocdbt", "_CHECKPOINT_METADATA"])
def test_a_pipe_in_a_state_is_named_instead_of_waiting_for_it(tmp_path, states, name):
    save(tmp_path, states[:2])
    (tmp_path / "2" / name).unlink()
    os.mkfifo(tmp_path / "2" / name)
    if name == "_CHECKPOINT_METADATA":  # Orbax reads those of all states
        with pytest.raises(InputError, match=f"{name} is not a file, but .* a pipe"):
            newest_run(tmp_path)
    else:
        assert newest_run(tmp_path) == (1, RUN)


def test_if_all_states_are_damaged_the_error_names_each(tmp_path, parts, states):
    save(tmp_path, states[:2])
    for step in ("1", "2"):
        (tmp_path / step / "step" / "metadata").write_text("{}")
    for _ in range(2):  # nothing moves, so that the next start does not find an empty folder
        with open_in(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=r"(?s)step 2: .*step 1: "):
            checkpoints.restore(parts.abstract_state)


def test_with_only_damaged_states_set_aside_a_run_does_not_start_again(tmp_path, parts, states):
    save(tmp_path, states[:2])
    (tmp_path / "damaged").mkdir()
    for step in ("1", "2"):
        (tmp_path / step).rename(tmp_path / "damaged" / step)
    with open_in(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=r"of step 1, 2.*--run-dir"):
        checkpoints.restore(parts.abstract_state)


def test_a_state_of_other_shapes_is_an_error_that_lists_arrays_and_not_damage(tmp_path, parts, states):
    save(tmp_path, states[:2])
    _, wider = open_and_make_parts(tiny(mesh=sharded(1, 1), model__hidden_sizes=(24,)), jax.devices()[:1])
    with open_in(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=r"params/head/kernel: float32\[8, 10\] -> float32\[24, 10\]"):
            checkpoints.restore(wider.abstract_state)
        assert_equal(checkpoints.restore(parts.abstract_state), states[1])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(5, "Input/output error"), CheckpointError),
        (ValueError("UNAVAILABLE: the bucket does not answer"), CheckpointError),
        (MemoryError(), MemoryError),
    ],
)
def test_errors_of_storage_or_memory_are_not_damage(tmp_path, parts, states, monkeypatch, error, expected):
    def fail(*arguments, **options):
        raise error

    save(tmp_path, states[:2])
    with open_in(tmp_path) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(ocp.StandardCheckpointHandler, "restore", fail)
            with pytest.raises(expected):
                checkpoints.restore(parts.abstract_state)
        assert_equal(checkpoints.restore(parts.abstract_state), states[1])


def with_checksum(record):
    return json.dumps(record | {"checksum": _checksum(record)})


def test_a_record_that_is_nested_too_deeply_is_damage(tmp_path, parts, states):
    save(tmp_path, states[:2])
    (tmp_path / "2" / "step" / "metadata").write_text("[" * 100_000)
    with open_in(tmp_path) as checkpoints:
        assert_equal(checkpoints.restore(parts.abstract_state), states[0])


def test_a_state_records_its_run(tmp_path, states):
    assert newest_run(tmp_path / "new") is None
    with open_in(tmp_path) as checkpoints:
        checkpoints.save(states[0])
        checkpoints.save(states[1])
    assert newest_run(tmp_path) == (2, RUN)
    record = json.loads((tmp_path / "2" / "step" / "metadata").read_text())
    forged = ({"run": "text"}, {"run": {"recipe": 1}}, {"arrays": [1]}, {"fingerprints": None}, {"skipped": 1 << 31})
    for damaged in ("[" * 100_000, "{}", *(with_checksum(record | change) for change in forged)):
        (tmp_path / "2" / "step" / "metadata").write_text(damaged)
        assert newest_run(tmp_path) == (1, RUN), "the record of the state before is read"
    (tmp_path / "1" / "step" / "metadata").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)No checkpoint .*step 2: its record is not as it was .*step 1: "):
        newest_run(tmp_path)


def test_a_record_without_checksum_counts_as_damaged(tmp_path, parts, states, caplog):
    save(tmp_path, states[:2])
    path = tmp_path / "2" / "step" / "metadata"
    record = json.loads(path.read_text())
    del record["checksum"]
    path.write_text(json.dumps(record))
    with caplog.at_level(logging.WARNING), open_in(tmp_path) as checkpoints:
        assert_equal(checkpoints.restore(parts.abstract_state), states[0])
    assert "The checkpoint of step 2 is damaged: its record is not as it was written" in caplog.text


def test_a_state_among_skipped_steps_is_written_only_as_the_last(tmp_path, parts, states):
    skipping = states[1].replace(skipped_in_a_row=jnp.int32(3))
    save(tmp_path, [states[0], skipping])
    with open_in(tmp_path) as checkpoints:
        assert checkpoints.steps == [1]
        checkpoints.save(skipping, last=True)
        assert_equal(checkpoints.restore(parts.abstract_state), skipping)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 2 MB."""
    with disk(tmp_path / "disk", megabytes=2) as folder:
        yield folder


def test_a_full_disk_is_an_error_and_leaves_the_state_before(small_disk, parts, states):
    with open_in(small_disk) as checkpoints:
        checkpoints.save(states[0], last=True)
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        (small_disk / "ballast").write_bytes(b"\0" * max(0, free - 16_384))
        with pytest.raises(CheckpointError, match=r"(?s)No space left on device.*checkpoints before it are complete"):
            checkpoints.save(states[1], last=True)
    # Orbax's other threads still write for some milliseconds. A program would end here, and wait for them.
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            threading.Thread.join(thread)  # Orbax's own `join` raises what went wrong in the thread
    (small_disk / "ballast").unlink()
    with open_in(small_disk) as checkpoints:
        assert_equal(checkpoints.restore(parts.abstract_state), states[0])
        checkpoints.save(states[1], last=True)
        assert_equal(checkpoints.restore(parts.abstract_state), states[1])


def test_half_written_states_are_deleted(tmp_path, parts, states):
    save(tmp_path, states[:1])
    (tmp_path / "1").rename(tmp_path / "2.orbax-checkpoint-tmp")
    save(tmp_path, states[:1])
    with open_in(tmp_path) as checkpoints:
        assert_equal(checkpoints.restore(parts.abstract_state), states[0])
    assert not list(tmp_path.glob("*tmp*"))


@pytest.fixture
def as_in_a_bucket(monkeypatch):
    """Lets Orbax mark complete states by a file in their folders, as where folders cannot be renamed."""
    for default in ("get_default_temporary_path_class", "get_item_default_temporary_path_class"):
        monkeypatch.setattr(
            ocp.path.atomicity_defaults, default, lambda *_, **options: ocp.path.atomicity.CommitFileTemporaryPath
        )


def test_a_half_written_state_in_a_bucket_does_not_count(tmp_path, parts, states, as_in_a_bucket):
    (tmp_path / "1" / "params").mkdir(parents=True)
    assert newest_run(tmp_path) is None
    with open_in(tmp_path) as checkpoints:
        assert checkpoints.restore(parts.abstract_state) is None
        checkpoints.save(states[0], last=True)
    assert newest_run(tmp_path) == (1, RUN)
    (tmp_path / "2").mkdir()
    assert newest_run(tmp_path) == (1, RUN)
    with open_in(tmp_path) as checkpoints:
        assert_equal(checkpoints.restore(parts.abstract_state), states[0])


def test_only_states_are_deleted_from_a_bucket(tmp_path, states, as_in_a_bucket):
    for name in ("damaged/1", "other files"):
        (tmp_path / name).mkdir(parents=True)
    save(tmp_path, states, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"3", "damaged", "other files"}


def test_the_record_says_which_step_it_is(tmp_path, states):
    save(tmp_path, states[:1])
    record = json.loads((tmp_path / "1" / "step" / "metadata").read_text())
    assert (record["step"], record["skipped"], record["skipped_in_a_row"]) == (1, 1, 0)


def test_saving_the_last_state_waits_until_it_is_complete(tmp_path, states):
    with open_in(tmp_path) as checkpoints:
        checkpoints.save(states[0])
        checkpoints.save(states[0], last=True)
        assert (tmp_path / "1").is_dir(), "only a whole state has this name"

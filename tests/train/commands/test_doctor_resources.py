"""The doctor compares what a run needs with the memory and the disk that it has."""

import dataclasses
import re
import shutil
from types import SimpleNamespace

import jax
import pytest
from jax.errors import JaxRuntimeError

from doctor_runs import failures, findings, of_folder
from poolformer_jax import resources
from train import setup
from train.commands import doctor, resource_checks
from train.data.sources import folders
from training import open_and_make_parts, tiny

pytestmark = pytest.mark.usefixtures("only_requested_steps_are_compiled")


def test_checkpoints_that_are_never_deleted_need_space_too(folder, tmp_path):
    (disk,) = findings(of_folder(folder, tmp_path, max_steps=4, keep_every=2, keep_checkpoints=3), "disk")
    # Of steps 2 and 4, the newest three, and one that is being written.
    assert disk.found.startswith("6 states of ")


def test_existing_checkpoints_need_no_more_space(folder, tmp_path, monkeypatch):
    config = of_folder(folder, tmp_path, keep_checkpoints=4)
    leaves = jax.tree.leaves(open_and_make_parts(config)[1].abstract_state)
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4 * state))
    for steps, level in (((), "failure"), ((2, 4, 6), "fine")):
        for step in steps:
            (tmp_path / "run" / "checkpoints" / str(step)).mkdir(parents=True)
        (found,) = findings(config, "disk")
        assert (found.level, "3 of them there already" in found.found) == (level, bool(steps))


@pytest.mark.slow
def test_the_memory_of_a_head_only_run_is_that_of_its_features(folder, tmp_path, compiled_step):
    """It computes them in batches of an evaluation, and its training step takes no images."""
    changes = {
        "optimizer__freeze": ("backbone",),
        "model__drop_path_rate": 0.0,
        "data__augment": dataclasses.replace(tiny().data.augment, horizontal_flip=0.0),
    }
    needs = []
    for size in (8, 8000):
        config = of_folder(folder, tmp_path, data__evaluation_batch_size=size, **changes)
        (memory,) = findings(config, "device memory")
        needs.append(float(re.search(r"needs ([\d.]+) MB", memory.found)[1]))
    assert needs[1] > 5 * needs[0]


def in_megabytes(config):
    """What the workers need by the finding about the host's memory."""
    (memory,) = findings(config, "host memory")
    number, unit = re.search(r"need about ([\d.]+) ([MG])B", memory.found).groups()
    return float(number) * {"M": 1, "G": 1000}[unit], memory.found


def test_the_workers_of_an_evaluation_are_counted_beside_the_trainings(folder, tmp_path):
    needed, found = in_megabytes(of_folder(folder, tmp_path, data__workers=2))
    assert found.startswith("data workers (2 for training, 2 for evaluations) need about ")
    assert needed >= 4 * 150
    # All images in one batch are one worker's.
    batch = 8008 * 16 * 16 / 1e6
    other, found = in_megabytes(of_folder(folder, tmp_path, data__workers=2, data__evaluation_batch_size=8008))
    assert found.startswith("data workers (2 for training, 1 for evaluations) need about ")
    # One worker has 2 + 2 ready, 2 to hand on and 2 in the making, and one is in use; what two had of 8 is nothing.
    assert other - needed == pytest.approx(9 * batch - 150, abs=0.2)


def test_the_workers_batches_are_compared_with_free_shared_memory(folder, tmp_path, monkeypatch):
    changes = {"data__worker_batches": 3, "data__evaluation_batch_size": 8008}
    config = of_folder(folder, tmp_path, data__workers=2, **changes)
    # Eight of each of training's two workers, and one in use; eight and one of evaluations' single worker.
    needed = 17 * 8 * 16 * 16 + 9 * 8008 * 16 * 16
    for free, level in ((needed + 1, "fine"), (needed, "failure")):
        monkeypatch.setattr(resource_checks, "_free_shared_memory", lambda free=free: free)
        (memory,) = findings(config, "shared memory")
        expected = "the workers keep up to 26 batches in /dev/shm, 18.5 MB in all, and 18.5 MB are free there"
        assert (memory.level, memory.found) == (level, expected)
    for remedy in ("--shm-size", "emptyDir with medium: Memory at /dev/shm", "--data.worker-batches 1"):
        assert remedy in memory.remedy
    assert not findings(of_folder(folder, tmp_path, data__workers=0, **changes), "shared memory")
    monkeypatch.setattr(resource_checks, "_free_shared_memory", lambda: None)
    assert not findings(config, "shared memory")


def test_the_memory_of_a_container_is_less_than_the_hosts(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "available_memory", lambda: 640e6)
    (found,) = findings(of_folder(folder, tmp_path, data__workers=2), "host memory")
    assert re.search(r"need about 600\.\d MB of the 640\.0 MB available", found.found)
    assert found.level == "failure"


def test_the_source_counts_twice_for_each_worker(folder, tmp_path, monkeypatch):
    """Two workers keep 10 MB of names, pickled and unpickled; so do those of evaluations."""
    config = of_folder(folder, tmp_path, data__workers=2)
    needed, _ = in_megabytes(config)
    counter = {f".{'x' * 1_000_000}{number}": 1 for number in range(10)}
    read = folders.read_class_folders
    monkeypatch.setattr(
        folders, "read_class_folders", lambda *given: dataclasses.replace(read(*given), skipped=counter)
    )
    assert in_megabytes(config)[0] - needed == pytest.approx(4 * 2 * 10, abs=0.2)


def test_a_step_that_the_compiler_refuses_for_its_memory_is_reported(folder, tmp_path, monkeypatch, compiled_step):
    expected = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (19.03G) ..."
    )

    def refuse(*_):
        raise JaxRuntimeError(f"{expected}\nand many lines about single arrays")

    def make_parts(*given, **named):
        return dataclasses.replace(setup.make_parts(*given, **named), step=SimpleNamespace(lower=refuse))

    monkeypatch.setattr(doctor, "make_parts", make_parts)
    (found,) = failures(of_folder(folder, tmp_path))
    assert (found.subject, found.found) == ("device memory", f"the step does not fit: {expected}")
    assert "--mesh.fsdp" in found.remedy

"""Worker processes never import jax, and live as long as the program that started them."""

import contextlib
import dataclasses
import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from programs import ROOT, alive, wait_for_the_end_of, workers_of
from small_data import SMALL
from train.data.pipeline import evaluation_batches, train_batches
from train.data.sources.opening import open_source
from train.data.workers import shared_memory
from train.data.workers.shared_memory import Room
from train.data.workers.worker_errors import WorkerError, loss_of_a_worker

# A program with two workers, started as `python program.py` or `python -m package`: Python prepares their children in
# different ways. It imports jax before anything else, as a person's script may.
PROGRAM = """
    import jax
    import sys
    import numpy as np
    from train.data.config import DIGITS
    from train.data.pipeline import train_batches
    from train.data.sources.source import ArraySource

    class Spy(ArraySource):
        def __getitem__(self, index):
            imported = any(sys.modules.get(name) is not None for name in ("jax", "jaxlib", "flax", "tensorflow"))
            return {**super().__getitem__(index), "label": int(imported)}

    if __name__ == "__main__":
        import dataclasses

        source = Spy(np.zeros((64, 8, 8), np.uint8), np.zeros(64, int), ("id",) * 64, ("no", "yes"))
        batches = train_batches(dataclasses.replace(DIGITS, batch_size=8, workers=2), source)
        print([int(next(batches)["label"].sum()) for _ in range(4)], flush=True)
        sys.stdin.readline()
        print(next(batches)["image"].shape, flush=True)
"""


@contextlib.contextmanager
def program_with_workers(tmp_path, *start):
    (tmp_path / "package").mkdir()
    for path in (tmp_path / "program.py", tmp_path / "package" / "__main__.py"):
        path.write_text(textwrap.dedent(PROGRAM))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, *(start or ("program.py",))]
    with subprocess.Popen(command, text=True, cwd=tmp_path, env=environment, **pipes) as program:
        try:
            yield program
        finally:
            program.kill()


linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through /proc")


@linux
@pytest.mark.parametrize("start", [("program.py",), ("-m", "package")])
def test_workers_never_import_jax(tmp_path, start):
    with program_with_workers(tmp_path, *start) as program:
        assert program.stdout.readline() == "[0, 0, 0, 0]\n", program.stderr.read()
        workers = workers_of(program.pid)
        assert len(workers) == 2
        assert "jaxlib" in Path(f"/proc/{program.pid}/maps").read_text()
        for worker in workers:
            assert "jaxlib" not in Path(f"/proc/{worker}/maps").read_text()
        _, errors = program.communicate("\n", timeout=60)
    assert errors == ""
    assert program.returncode == 0
    assert not any(alive(worker) for worker in workers)


@linux
def test_workers_survive_the_signals_that_ask_the_program_to_save_and_stop(tmp_path):
    with program_with_workers(tmp_path) as program:
        program.stdout.readline()
        workers = workers_of(program.pid)
        for worker in workers:
            for name in (signal.SIGTERM, signal.SIGINT):  # as a job scheduler sends them to every process
                os.kill(worker, name)
        time.sleep(0.5)
        assert all(alive(worker) for worker in workers)
        output, errors = program.communicate("\n", timeout=60)
    assert (output, errors) == ("(8, 32, 32, 1)\n", "")


@linux
def test_workers_do_not_outlive_a_program_that_is_killed(tmp_path):
    with program_with_workers(tmp_path) as program:
        program.stdout.readline()
        workers = workers_of(program.pid)
        program.kill()
        program.wait()
    wait_for_the_end_of(workers)


@linux
def test_no_more_workers_start_than_there_are_batches():
    config = dataclasses.replace(SMALL, workers=5, batch_size=256)
    with evaluation_batches(config, open_source(config, "validation")) as batches:
        assert next(batches)["mask"].sum() == 256
        assert len(workers_of(os.getpid())) <= 2
        assert next(batches)["mask"].sum() == 359 - 256


@linux
@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGBUS, r"SIGBUS \(exit code -7\): the shared memory.* is full.*--shm-size.*--data.workers 0"),
        (signal.SIGKILL, r"SIGKILL \(exit code -9\).*memory of the host, or of the container.*fewer --data.workers"),
        (signal.SIGSEGV, r"SIGSEGV \(exit code -11\).*doctor RECIPE` looks for damaged images"),
    ],
)
def test_a_worker_that_dies_is_reported_with_the_remedy(number, told):
    config = dataclasses.replace(SMALL, workers=1)
    with train_batches(config, open_source(config, "validation")) as batches:
        next(batches)
        for worker in workers_of(os.getpid()):
            assert "jaxlib" not in Path(f"/proc/{worker}/maps").read_text()
            os.kill(worker, number)
        with pytest.raises(WorkerError, match=told):
            for _ in range(20):
                next(batches)


# With a worker's batches of 201 kB, of which a small /dev/shm holds a few.
FULL = """
    import numpy as np
    from train.data.config import DIGITS
    from train.data.pipeline import train_batches
    from train.data.sources.source import ArraySource

    if __name__ == "__main__":
        import dataclasses

        source = ArraySource(np.zeros((64, 8, 8), np.uint8), np.zeros(64, int), ("id",) * 64, ("no", "yes"))
        with train_batches(dataclasses.replace(DIGITS, batch_size=4, image_size=224, workers=1), source) as batches:
            kept = []
            while len(kept) < 20:
                kept.append(next(batches))
"""


@linux
def test_full_shared_memory_is_named_with_the_remedy(tmp_path):
    """A worker writes to a real /dev/shm that is full, as a container's soon is."""
    (tmp_path / "program.py").write_text(textwrap.dedent(FULL))
    alone = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /dev/shm || exit 77; exec $0 $@"]
    program = subprocess.run(
        [*alone, sys.executable, "program.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if program.returncode == 77 or "unshare" in program.stderr:
        pytest.skip(f"a /dev/shm of one's own needs root: {program.stderr.strip()}")
    assert program.returncode == 1
    (told,) = [line for line in program.stderr.splitlines() if "WorkerError: " in line]
    assert "ended by SIGBUS (exit code -7): the shared memory of 1.0 MB in /dev/shm" in told


@pytest.mark.parametrize("make", [train_batches, evaluation_batches])
def test_a_batch_that_shared_memory_cannot_hold_is_refused_at_once(monkeypatch, make):
    config = dataclasses.replace(SMALL, workers=2, worker_batches=2)
    source = open_source(config, "validation")
    batch = 8 * 16 * 16
    monkeypatch.setattr(shared_memory, "room", lambda: Room(batch - 1, batch - 1))
    # Each worker has 2 on the way, 2 taken in and 2 to hand on; one is in use.
    with pytest.raises(ValueError, match=r"(?s)0\.0 MB in all\. Expected room for 13\..*--data\.workers 0"):
        make(config, source)
    make(dataclasses.replace(config, workers=0), source).close()
    for room in (None, Room(batch, 0)):  # what is not free now may be free when the batch is made
        monkeypatch.setattr(shared_memory, "room", lambda room=room: room)
        make(config, source).close()


@linux
def test_no_more_batches_are_in_shared_memory_than_are_counted():
    config = dataclasses.replace(SMALL, workers=2, worker_batches=2, batch_size=7)
    before = in_shared_memory(7 * 16 * 16)
    with train_batches(config, open_source(config, "validation")) as batches:
        kept = next(batches)
        assert wait_for(lambda: len(in_shared_memory(7 * 16 * 16) - before) == shared_memory.most_batches(2, 2))
        time.sleep(1)
        assert len(in_shared_memory(7 * 16 * 16) - before) == shared_memory.most_batches(2, 2)
        assert kept["image"].shape == (7, 16, 16, 1)


def in_shared_memory(size):
    """Names of what has that many bytes there."""
    found = set()
    for path in Path("/dev/shm").iterdir():
        with contextlib.suppress(FileNotFoundError):  # others come and go
            found |= {path} if path.stat().st_size == size else set()
    return found


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_shared_memory_without_a_limit_of_its_own_has_room(monkeypatch, tmp_path):
    monkeypatch.setattr(shared_memory, "_FOLDER", tmp_path / "none")
    assert shared_memory.room() is None
    monkeypatch.setattr(shared_memory, "_FOLDER", tmp_path)
    assert shared_memory.room().free > 0
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_blocks=0, f_bavail=0, f_frsize=4096))  # size=0
    assert shared_memory.room() is None


def test_other_errors_of_the_pipeline_are_not_taken_for_a_lost_worker():
    for error in (RuntimeError("no worker"), OSError(errno.EIO, "Input/output error")):
        assert loss_of_a_worker(error) is None
    told = loss_of_a_worker(OSError(errno.ENOSPC, "No space left on device"))
    assert "cannot be started: the shared memory" in str(told)
    other = loss_of_a_worker(RuntimeError("Worker process was terminated unexpectedly with exit code -35. Search"))
    assert "ended by signal 35 (exit code -35)" in str(other), "one without a name"
    assert "ended with exit code 1. Its own output" in str(
        loss_of_a_worker(RuntimeError("Worker process was terminated unexpectedly with exit code 1. Search"))
    )

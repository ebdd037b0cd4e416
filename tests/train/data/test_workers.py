"""Worker processes never import jax, end with their program, and are reported with remedies when they fail."""

import contextlib
import dataclasses
import errno
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from programs import ROOT, alive, wait_for_the_end_of, workers_of
from small_data import SMALL
from train.data import WorkerError, evaluation_batches, max_shared_batches, open_source, train_batches
from train.data.workers import segments as segments_module, start
from train.data.workers.failures import is_worker_failure
from train.data.workers.start import start_workers_without_jax

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads processes and shared memory from /proc and /dev")

# Two workers, started as `python program.py` or `python -m package`, which Python prepares in different ways. It
# imports jax before anything else, as a user's script may.
PROGRAM = """
    import jax
    import sys
    import numpy as np
    from train.data import DIGITS, ArraySource, train_batches

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
        cycle = [next(batches)]
        cycle.append(cycle)  # lives until a garbage collection: Python would warn of leaked shared memory at exit
        print(cycle[0]["image"].shape, flush=True)
        del cycle
"""


@contextlib.contextmanager
def program_with_workers(tmp_path, *start, session=False):
    (tmp_path / "package").mkdir()
    for path in (tmp_path / "program.py", tmp_path / "package" / "__main__.py"):
        path.write_text(textwrap.dedent(PROGRAM))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, *(start or ("program.py",))]
    with subprocess.Popen(
        command, text=True, cwd=tmp_path, env=environment, start_new_session=session, **pipes
    ) as program:
        try:
            yield program
        finally:
            program.kill()


@pytest.mark.parametrize("start", [("program.py",), pytest.param(("-m", "package"), marks=pytest.mark.slow)])
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


@pytest.mark.slow
def test_workers_ignore_the_signals_that_ask_the_program_to_save_and_stop(tmp_path):
    with program_with_workers(tmp_path) as program:
        program.stdout.readline()
        workers = workers_of(program.pid)
        for worker in workers:
            for name in (signal.SIGTERM, signal.SIGINT):  # a job scheduler sends them to every process
                os.kill(worker, name)
        time.sleep(0.5)
        assert all(alive(worker) for worker in workers)
        output, errors = program.communicate("\n", timeout=60)
    assert (output, errors) == ("(8, 32, 32, 1)\n", "")


def test_a_stop_signal_does_not_end_a_worker_that_still_imports():
    start_workers_without_jax()
    worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,), name=start._WORKER_NAME)
    worker.start()
    status = Path(f"/proc/{worker.pid}/status")
    stop_signals = 1 << signal.SIGINT - 1 | 1 << signal.SIGTERM - 1
    try:
        for _ in range(200):
            ignored = int(re.search(r"SigIgn:\t(\w+)", status.read_text())[1], 16)
            if ignored & stop_signals == stop_signals:
                return
            time.sleep(0.05)
        pytest.fail("The worker does not ignore them.")
    finally:
        worker.kill()
        worker.join()


def test_ctrl_c_does_not_reach_a_worker_that_still_starts():
    start_workers_without_jax()
    worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,), name=start._WORKER_NAME)
    starter = threading.Thread(target=worker.start)  # as Grain's
    starter.start()
    starter.join()
    status = dict(line.split(":\t") for line in Path(f"/proc/{worker.pid}/status").read_text().splitlines())
    worker.kill()
    worker.join()
    assert int(status["SigBlk"], 16) >> (signal.SIGINT - 1) & 1
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])  # of the main thread


@pytest.mark.slow
def test_workers_end_when_the_program_is_killed(tmp_path):
    with program_with_workers(tmp_path) as program:
        program.stdout.readline()
        workers = workers_of(program.pid)
        program.kill()
        program.wait()
    wait_for_the_end_of(workers)


def segments(program):
    """What is in shared memory by the names of a program, which a file that it keeps open shows."""
    opened = set()
    for link in Path(f"/proc/{program.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed by now
            opened.add(link.readlink())
    prefix = min((path.name for path in opened if path.match("/dev/shm/poolformer-jax-*")), key=len)  # the lock file's
    return prefix, lambda: {path.name for path in Path("/dev/shm").glob(f"*{prefix}*")}


@pytest.mark.slow
def test_the_next_run_frees_the_shared_memory_of_one_that_was_killed_with_all_its_processes(tmp_path):
    (tmp_path / "killed").mkdir()
    (tmp_path / "running").mkdir()
    with program_with_workers(tmp_path / "killed", session=True) as killed:
        killed.stdout.readline()
        prefix, abandoned = segments(killed)
        with program_with_workers(tmp_path / "running") as running:
            running.stdout.readline()
            _, kept = segments(running)
            os.killpg(killed.pid, signal.SIGKILL)
            killed.wait()
            assert any(name.startswith(f"sem.{prefix}") for name in abandoned())
            assert any(name.startswith(f"{prefix}-") for name in abandoned())
            segments_module.free_abandoned_segments()
            assert not abandoned()
            assert len(kept()) > 1, "the running program keeps its segments"
            running.communicate("\n", timeout=60)
    assert not kept()


def test_shared_memory_of_a_run_that_has_ended_is_freed_and_that_of_a_living_one_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(segments_module, "_FOLDER", tmp_path)
    mine = segments_module.segment_prefix.__wrapped__()
    dead = "poolformer-jax-0123456789abcdef"
    kept = {mine, f"{mine}-00", "psm_1234", "poolformer-jax-note"}
    for name in (*kept, dead, f"{dead}-00", "poolformer-jax-fedcba9876543210-00"):
        (tmp_path / name).touch()
    config = dataclasses.replace(SMALL, workers=0)  # a run without workers frees them, too
    with evaluation_batches(config, open_source(config, "validation")) as batches:
        next(batches)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_no_more_workers_start_than_there_are_batches():
    config = dataclasses.replace(SMALL, workers=5, batch_size=256)
    with evaluation_batches(config, open_source(config, "validation")) as batches:
        assert next(batches)["mask"].sum() == 256
        assert len(workers_of(os.getpid())) <= 2
        assert next(batches)["mask"].sum() == 359 - 256


@pytest.mark.parametrize("number", [pytest.param(signal.SIGBUS, marks=pytest.mark.slow), signal.SIGKILL])
def test_a_killed_worker_is_reported_with_its_exit_code_and_the_remedies(number):
    config = dataclasses.replace(SMALL, workers=1)
    message = rf"(?s)exit code {-number}\..*SIGBUS.*--shm-size.*SIGKILL.*fewer workers.*doctor RECIPE.*same command"
    with train_batches(config, open_source(config, "validation")) as batches:
        next(batches)
        for worker in workers_of(os.getpid()):
            os.kill(worker, number)
        with pytest.raises(WorkerError, match=message):
            for _ in range(20):
                next(batches)


def test_only_lost_workers_and_full_shared_memory_are_worker_failures():
    assert is_worker_failure(RuntimeError("Worker process was terminated"))
    assert is_worker_failure(OSError(errno.ENOSPC, "No space left on device"))
    assert not is_worker_failure(OSError(errno.EIO, "Input/output error"))


@pytest.mark.slow
def test_no_more_batches_are_in_shared_memory_than_doctor_counts():
    config = dataclasses.replace(SMALL, workers=2, worker_batches=2, batch_size=7)
    before = files_in_shared_memory(7 * 16 * 16)
    limit = max_shared_batches(2, 2)
    with train_batches(config, open_source(config, "validation")) as batches:
        kept = next(batches)
        deadline = time.monotonic() + 60
        while len(files_in_shared_memory(7 * 16 * 16) - before) < limit and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1)
        assert len(files_in_shared_memory(7 * 16 * 16) - before) == limit
        assert kept["image"].shape == (7, 16, 16, 1)


def files_in_shared_memory(size):
    """The files of `size` bytes."""
    found = set()
    for path in Path("/dev/shm").iterdir():
        with contextlib.suppress(FileNotFoundError):  # other processes remove theirs
            found |= {path} if path.stat().st_size == size else set()
    return found

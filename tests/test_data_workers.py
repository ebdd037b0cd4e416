"""Worker processes never import jax, and live as long as the program that started them."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from programs import ROOT, alive, wait_for_the_end_of, workers_of
from small_data import SMALL
from train.data.pipeline import evaluation_batches, train_batches
from train.data.sources import open_source

# A program with two workers, started as `python program.py` or `python -m package`: Python prepares their children in
# different ways. It imports jax before anything else, as a person's script may.
PROGRAM = """
    import jax
    import sys
    import numpy as np
    from train.data.config import DIGITS
    from train.data.pipeline import train_batches
    from train.data.sources import ArraySource

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
def test_a_worker_that_dies_is_reported():
    config = dataclasses.replace(SMALL, workers=1)
    with train_batches(config, open_source(config, "validation")) as batches:
        next(batches)
        for worker in workers_of(os.getpid()):
            assert "jaxlib" not in Path(f"/proc/{worker}/maps").read_text()
            os.kill(worker, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="terminated unexpectedly"):
            for _ in range(20):
                next(batches)

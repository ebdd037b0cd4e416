"""Runs `python -m train` in processes, with signals and deadlines."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
# A run of seconds: `smoke` with a network of one small block, and without augmentation that compiles slowly.
TINY = (
    *("smoke", "--model.depths", "1", "--model.hidden-sizes", "8", "--model.patch-sizes", "7", "--model.strides", "4"),
    *("--model.padding", "2", "--model.token-mixers", "pooling", "--model.position-embeddings", "False"),
    *("--model.dropout-rate", "0.1", "--data.image-size", "16", "--data.batch-size", "16"),
    *("--data.synthetic-examples", "64", "--data.augment.randaugment", "none", "--data.mix.mixup", "0"),
    *("--data.mix.cutmix", "0", "--data.mix.erase-probability", "0", "--log-every", "1", "--save-every", "2"),
    *("--evaluate-every", "100", "--example-images", "1"),
)
DEADLINE = 180.0  # seconds; only a hang takes so long


def start(arguments: Sequence[str], devices: int = 1, **environment: str) -> subprocess.Popen[str]:
    """Starts `python -m train ARGUMENTS` with `devices` CPU devices."""
    # These programs compile the same functions. Half of them compile faster than the threshold of conftest.py.
    usual = {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "COLUMNS": "120"}
    return subprocess.Popen(
        [sys.executable, "-m", "train", *arguments],
        cwd=ROOT,
        env={**os.environ, **usual, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int | None = 0) -> str:
    """Waits for the end, checks the exit code, and returns everything that was printed."""
    try:
        output, _ = process.communicate(timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"still running after {DEADLINE} s:\n{output}") from None
    assert code is None or process.returncode == code, f"exit code {process.returncode}, not {code}:\n{output}"
    return output


def run(arguments: Sequence[str], code: int | None = 0, devices: int = 1, **environment: str) -> str:
    """Runs `python -m train ARGUMENTS` to its end."""
    return finish(start(arguments, devices, **environment), code)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> bool:
    """True if the condition held before the process ended."""
    deadline = time.monotonic() + DEADLINE
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.001)
    return condition()


def kill_when(condition: Callable[[], bool], arguments: Sequence[str], number: signal.Signals, devices: int = 1) -> int:
    """Starts the program, sends a signal once the condition holds, and returns its exit code."""
    process = start(arguments, devices)
    wait_until(condition, process)
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)
    finish(process, code=None)
    return process.returncode


def workers_of(pid: int) -> list[int]:
    """The process ids of the data workers of a process; on Linux."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    children = {child for thread in threads for child in (thread / "children").read_text().split()}
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def alive(pid: int) -> bool:
    """True if a process runs; on Linux."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_the_end_of(workers: Sequence[int]) -> None:
    """Waits for workers whose program was killed: they notice it a moment later."""
    deadline = time.monotonic() + 30
    while any(alive(worker) for worker in workers):
        assert time.monotonic() < deadline, "a worker is still there"
        time.sleep(0.05)


def start_together(
    arguments: Sequence[str] | Sequence[Sequence[str]], processes: int, devices: int = 1
) -> list[subprocess.Popen[str]]:
    """Starts one run in several processes that join by flags, with one command line for all or one for each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = f"--distributed.coordinator-address 127.0.0.1:{port} --distributed.num-processes {processes}".split()
    own = [arguments] * processes if isinstance(arguments[0], str) else arguments
    return [start([*own[index], *flags, "--distributed.process-id", str(index)], devices) for index in range(processes)]


def start_under_slurm(arguments: Sequence[str], processes: int, devices: int) -> list[subprocess.Popen[str]]:
    """Starts one run in several processes with the environment variables of `srun`."""
    job = {
        "SLURM_JOB_ID": str(os.getpid()),  # from which jax chooses the port
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": str(processes),
    }
    return [
        start(arguments, devices, **job, SLURM_PROCID=str(index), SLURM_LOCALID=str(index))
        for index in range(processes)
    ]


@contextlib.contextmanager
def stopping(started: list[subprocess.Popen[str]]) -> Iterator[list[subprocess.Popen[str]]]:
    """Kills processes that still run when the block ends."""
    try:
        yield started
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.communicate()

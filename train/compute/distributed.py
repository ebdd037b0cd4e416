"""One run on many hosts: joining the processes, and comparing values between them.

`jax.distributed` detects TPU pods (GCE and GKE), Slurm's srun, Open MPI, and Kubernetes with jax's extra k8s. Anywhere
else flags give the address of process 0.
"""

import contextlib
import ctypes
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from poolformer_jax.errors import InputError
from train.config import DistributedConfig

_LOG = logging.getLogger(__name__)
_PROBE_SECONDS = 5
_NOTICE_SECONDS = 10
# jax aborts the interpreter when its timeout is over, so ours has to be shorter.
_JAX_EXTRA_SECONDS = 60
# A process that does not answer for this long is lost.
_LOST_SECONDS = 40


def lost_process_message(reason: str) -> str:
    """The sentence for a process that lost another one."""
    return (
        f"Another process of the run has ended or cannot be reached ({reason}); its output says why, and once that is "
        "fixed, the same command on all hosts resumes from the newest checkpoint."
    )


def initialize(config: DistributedConfig) -> None:
    """Joins the other processes of the run, if there are any. Call it before anything else uses a device.

    Raises InputError if process 0 does not answer at its address.
    """
    if config.mode == "off" or jax.distributed.is_initialized():
        return
    _join(config)
    if jax.distributed.is_initialized():
        _exit_when_jax_aborts()
    if _is_alone_on_its_host() and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        # Under Slurm and Open MPI jax gives every process a single GPU, even the only process on its host.
        for vendor in ("cuda", "rocm"):
            jax.config.update(f"jax_{vendor}_visible_devices", "all")


def _join(config: DistributedConfig) -> None:
    if config.coordinator_address is not None and config.process_id:
        _wait_for_process_0(config.coordinator_address, config.timeout)
    try:
        with _exit_after(config):
            jax.distributed.initialize(
                config.coordinator_address,
                config.num_processes,
                config.process_id,
                initialization_timeout=config.timeout + _JAX_EXTRA_SECONDS,
                heartbeat_timeout_seconds=_LOST_SECONDS,
            )
    except ValueError as error:
        # jax's error where no environment names other processes. Any other error must not start a run per host.
        if config.coordinator_address is not None or "coordinator_address" not in str(error):
            raise
        _LOG.debug("No other processes: %s", error)


@contextlib.contextmanager
def _exit_after(config: DistributedConfig) -> Iterator[None]:
    """Exits with one message if the block, which waits inside jax, takes longer than `config.timeout` seconds."""
    joined = threading.Event()
    others = "the other processes of the run"
    if config.coordinator_address is not None and config.num_processes is not None:
        others += f" ({config.num_processes} in all) to connect to process 0 at {config.coordinator_address}"

    def watch() -> None:
        notice = min(_NOTICE_SECONDS, config.timeout)
        if joined.wait(notice):
            return
        _LOG.warning("Waiting for %s, up to --distributed.timeout %d s.", others, config.timeout)
        if joined.wait(config.timeout - notice):
            return
        print(
            f"\nerror: Waited {config.timeout} s (--distributed.timeout) for {others}. Expected all of them to run the "
            "same command, and their hosts to reach that address; their output says what failed.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        joined.set()


def _exit_when_jax_aborts() -> None:
    """Makes SIGABRT exit with code 1 and one sentence.

    When jax loses another process, it prints a native stack trace and aborts the interpreter from another thread,
    which no handler of Python sees.
    """
    system = ctypes.CDLL(None)
    system.signal.argtypes = [ctypes.c_int, _Handler]
    system.signal.restype = ctypes.c_void_p
    system.signal(signal.SIGABRT, _ABORT_HANDLER)


def _exit_after_abort(number: int) -> None:
    os.write(sys.stderr.fileno(), f"\nerror: {lost_process_message('jax aborted this one')}\n".encode())
    os._exit(1)


_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
_ABORT_HANDLER = _Handler(_exit_after_abort)  # kept, because the system calls it at any time


def _is_alone_on_its_host() -> bool:
    """True if Slurm or Open MPI started no other process of the run on this host."""
    if size := os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"):
        return size == "1"
    # "2(x3),1" means two tasks on each of the first three nodes, and one on the fourth.
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    node = int(os.environ.get("SLURM_NODEID", 0))
    return node < len(counts) and counts[node] == 1


def _wait_for_process_0(address: str, seconds: int) -> None:
    """Returns when process 0 can be reached. jax would wait silently, and then abort the interpreter."""
    host, _, port = address.rpartition(":")
    start, warned = time.monotonic(), False
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_SECONDS):
                return
        except OSError as error:
            waited = time.monotonic() - start
            if waited >= seconds:
                raise InputError(
                    f"Process 0 of the run cannot be reached at {address} for {seconds} s: {error}. Expected "
                    "--distributed.coordinator-address to be the host of process 0, with a port that is free there and "
                    "open to the other hosts, and process 0 to be running."
                ) from error
            if waited >= _PROBE_SECONDS and not warned:
                _LOG.warning("Waiting for process 0 at %s: %s", address, error)
                warned = True
        time.sleep(1)


def has_other_processes() -> bool:
    """True if this is one of several processes of a run."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def from_process_0(value: Any) -> Any:
    """The JSON-ready value of process 0, on all processes."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.asarray(len(text))))
    room = np.zeros(length, np.uint8)
    room[: len(text)] = text[:length]
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(room), np.uint8).tobytes())


def processes_where(here: bool) -> list[int]:
    """The numbers of the processes where `here` is true, on all processes."""
    return np.flatnonzero(multihost_utils.process_allgather(np.asarray(here))).tolist()


def refuse_different_processes(changed: Sequence[str], expected: str) -> None:
    """Raises InputError on every process if one differs from process 0.

    Args:
        changed: what differs on this process, as lines of a message.
        expected: what should be the same on every host.
    """
    different = processes_where(bool(changed))
    expected = f"Expected {expected} on every host."
    if changed:
        lines = "\n  ".join(changed)
        raise InputError(f"Process {jax.process_index()} differs from process 0. What differs:\n  {lines}\n{expected}")
    if different:
        raise InputError(f"Other processes differ from process 0: {different}. Their output says how. {expected}")

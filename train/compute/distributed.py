"""One run on many hosts: how processes find each other, and stop together.

On TPU pods (GCE and GKE), under Slurm's srun, under Open MPI, and on Kubernetes with jax's extra k8s the processes find
each other by themselves, because `jax.distributed` knows these environments. Anywhere else they are told by flags.
"""

import json
import logging
import os
import re
import signal
import socket
import time
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from poolformer_jax.errors import InputError
from train.config import DistributedConfig

_LOG = logging.getLogger(__name__)
_PROBE_SECONDS = 5


def initialize(config: DistributedConfig) -> None:
    """Joins the other processes of the run, if there are any; before anything else touches a device.

    Raises:
        ConnectionError: if process 0 does not answer at its address.
    """
    if config.mode == "off" or jax.distributed.is_initialized():
        return
    _join(config)
    if _is_alone_on_its_host() and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        # Under Slurm and Open MPI jax takes every process for one of several on its host, and leaves it a single GPU.
        for vendor in ("cuda", "rocm"):
            jax.config.update(f"jax_{vendor}_visible_devices", "all")


def _join(config: DistributedConfig) -> None:
    if config.coordinator_address is not None:
        if config.process_id:
            _wait_for_process_0(config.coordinator_address, config.timeout)
        jax.distributed.initialize(
            config.coordinator_address,
            config.num_processes,
            config.process_id,
            initialization_timeout=config.timeout,
        )
        return
    try:
        jax.distributed.initialize(initialization_timeout=config.timeout)
    except ValueError as error:
        # What jax says where no environment told it of other processes; so there are none.
        if "coordinator_address" not in str(error):
            raise
        _LOG.debug("No other processes: %s", error)


def _is_alone_on_its_host() -> bool:
    """Whether Slurm or Open MPI says that it started no other process of the run here."""
    if size := os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"):
        return size == "1"
    # Of the nodes in order, as "2(x3),1": two tasks on each of three nodes, and one on the fourth.
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    node = int(os.environ.get("SLURM_NODEID", 0))
    return node < len(counts) and counts[node] == 1


def _wait_for_process_0(address: str, seconds: int) -> None:
    """Returns when it can be reached. jax would wait as long without a word, and then abort the interpreter."""
    host, _, port = address.rpartition(":")
    start, told = time.monotonic(), False
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_SECONDS):
                return
        except OSError as error:
            waited = time.monotonic() - start
            if waited >= seconds:
                raise ConnectionError(
                    f"Process 0 of the run cannot be reached at {address}, for {seconds} s: {error}. Expected "
                    "--distributed.coordinator-address to be the host of process 0, with a port that is free there and "
                    "open to the other hosts, and process 0 to be started as well."
                ) from error
            if waited >= _PROBE_SECONDS and not told:
                _LOG.warning("Waiting for process 0 at %s: %s", address, error)
                told = True
        time.sleep(1)


def others_depend_on_this() -> bool:
    """Whether this is one of several processes, which jax has wait for each other when one ends."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def from_process_0(value: Any) -> Any:
    """What process 0 gives here; JSON-ready."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.asarray(len(text))))
    room = np.zeros(length, np.uint8)
    room[: len(text)] = text[:length]
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(room), np.uint8).tobytes())


def processes_where(here: bool) -> list[int]:
    """The numbers of all processes where something is so, on every one of them."""
    return np.flatnonzero(multihost_utils.process_allgather(np.asarray(here))).tolist()


def refuse_unlike(changed: Sequence[str], expected: str) -> None:
    """Ends all processes if one was started unlike process 0, before they wait for each other for ever.

    Args:
        changed: what differs in this one.
        expected: what should be the same on every host.

    Raises:
        ValueError: in every process; with what differs where it does.
    """
    unlike = processes_where(bool(changed))
    expected = f"Expected {expected} on every host."
    if changed:
        told = "\n  ".join(changed)
        raise InputError(f"Process {jax.process_index()} differs from process 0. What differs:\n  {told}\n{expected}")
    if unlike:
        raise InputError(f"Other processes differ from process 0: {unlike}. They say in what. {expected}")


class StopRequest:
    """Whether the run was asked to stop: SIGTERM (what schedulers and preemption send) or Ctrl-C.

    Both are only noted, because an exception in the middle of a compilation, or in one of jax's callbacks, is lost or
    ends the interpreter; so there is something to call between any two parts of a run. With several processes, jax
    tells all of them of a SIGTERM to any of them and settles on one step at which all of them stop; so `at(step)` has
    to be called at every step. A second signal ends the process at once; but a SIGTERM amid several processes, where
    it is jax's, never does.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        self._listen(signal.SIGINT)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def listen_for_sigterm(self) -> None:
        """From now on; after `initialize`, which sets a handler of its own."""
        # With several processes SIGTERM belongs to jax's preemption service.
        if jax.process_count() == 1:
            self._listen(signal.SIGTERM)

    def before_training(self) -> None:
        """Raises KeyboardInterrupt after Ctrl-C. SIGTERM waits for the first step, to which it leaves a state."""
        if self.signal is signal.SIGINT:
            raise KeyboardInterrupt

    def at(self, step: int) -> bool:
        """Whether to stop after `step` steps, the same on all processes."""
        if jax.process_count() > 1:
            if multihost_utils.reached_preemption_sync_point(step):
                self.signal = signal.SIGTERM
            elif self.signal is signal.SIGINT:
                raise KeyboardInterrupt
        return self.signal is not None

    def _listen(self, number: signal.Signals) -> None:
        self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        # Not a handler in Python: that would wait until a compilation is over.
        for listened in self._before:
            signal.signal(listened, signal.SIG_DFL)

"""Starts data workers: without jax, and such that they end with the program that started them.

Grain starts every worker as a fresh interpreter and imports jax there, for tree functions that the package `tree`
provides as well. The import costs 2 seconds and 150 MB a worker, and a second process must not open a host's TPUs.
Python has no public way to prevent it, but a fresh interpreter first runs the main module that its parent names.
`start_workers_without_jax` makes that this file, which blocks the import. A worker then does not run the program's
main module either, and needs nothing from it: Grain pickles the functions of a main module by value.
"""

import functools
import logging
import multiprocessing.spawn
import os
import signal
import sys
import threading
from typing import Any

from train.data.workers.segments import name_segments

_WORKER_NAME = "grain-process-prefetch"
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@functools.cache
def start_workers_without_jax() -> None:
    """Makes Grain's workers, and no other child process, run this file first."""
    get_preparation_data = multiprocessing.spawn.get_preparation_data

    def get_worker_preparation_data(name: str) -> dict[str, Any]:
        data = get_preparation_data(name)
        if name.startswith(_WORKER_NAME):
            data.pop("init_main_from_path", None)
            data["init_main_from_name"] = __name__
        return data

    multiprocessing.spawn.get_preparation_data = get_worker_preparation_data
    _block_stop_signals_in_workers()


def _block_stop_signals_in_workers() -> None:
    """Starts workers with the signals blocked that ask a program to stop: the program stops its workers itself.

    A process inherits what is blocked. Ctrl-C in a terminal goes to the workers too. While they still import, it would
    end them with tracebacks, and the program would wait for their batches.
    """
    if os.name != "posix":
        return
    from multiprocessing import popen_spawn_posix, process, resource_tracker

    launch = popen_spawn_posix.Popen._launch  # type: ignore[attr-defined]

    def launch_worker(self: popen_spawn_posix.Popen, child: process.BaseProcess) -> None:
        if not child.name.startswith(_WORKER_NAME):
            launch(self, child)
            return
        resource_tracker.ensure_running()  # starting it would unblock the signals
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            launch(self, child)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    popen_spawn_posix.Popen._launch = launch_worker  # type: ignore[attr-defined]


def initialize_worker(prefix: str, worker: int, workers: int) -> None:
    """Ignores the signals that ask a program to stop, because the program stops its workers; exits if it is killed."""
    del worker, workers
    if prefix:
        name_segments(prefix)
    for name in _STOP_SIGNALS:
        signal.signal(name, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


if __name__ == "__mp_main__":
    sys.modules["jax"] = None  # type: ignore[assignment]
    logging.getLogger("absl").setLevel(logging.ERROR)  # Grain warns that jax's profiler is missing

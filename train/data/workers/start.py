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


@functools.cache
def start_workers_without_jax() -> None:
    """Makes Grain's workers, and no other child process, run this file first."""
    get_preparation_data = multiprocessing.spawn.get_preparation_data

    def get_worker_preparation_data(name: str) -> dict[str, Any]:
        data = get_preparation_data(name)
        if name.startswith(_WORKER_NAME):
            _block_stop_signals()
            data.pop("init_main_from_path", None)
            data["init_main_from_name"] = __name__
        return data

    multiprocessing.spawn.get_preparation_data = get_worker_preparation_data


def _block_stop_signals() -> None:
    """Blocks Ctrl-C and SIGTERM in Grain's thread that is about to start a worker, which inherits that.

    Python dies of Ctrl-C while it starts, before the worker's first module can ignore it, and then multiprocessing
    writes the worker's task into a pipe that nobody reads, forever. The main thread still gets the signals.
    """
    if threading.current_thread() is not threading.main_thread() and hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))


def initialize_worker(prefix: str, worker: int, workers: int) -> None:
    """Names the worker's shared memory, and ends it with the program."""
    del worker, workers
    if prefix:
        name_segments(prefix)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


if __name__ == "__mp_main__":
    # The program stops its workers itself. Ctrl-C in a terminal goes to them too: while they import, it would end them.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    sys.modules["jax"] = None  # type: ignore[assignment]
    logging.getLogger("absl").setLevel(logging.ERROR)  # Grain warns that jax's profiler is missing

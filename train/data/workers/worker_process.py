"""Data-loading worker processes start without jax.

Grain starts its workers as fresh interpreters and imports jax in each of them, for tree functions it can do without: 2
seconds and 150 MB a worker, and on a TPU host one careless call away from a fight over the chips. Before a fresh
interpreter imports anything of Grain it runs what its parent names as the main module. `name_as_main_of_workers` makes
that this file, which forbids the import; Grain then takes the `tree` package. So a worker does not run the program's
own main module either, and needs nothing from it: Grain sends functions by value where they have no other home.
"""

import logging
import multiprocessing
import multiprocessing.spawn
import sys
from typing import Any

_NAME_OF_WORKERS = "grain-process-prefetch"


def name_as_main_of_workers() -> None:
    """From now on Grain's workers, and no other process, run this file first."""
    original = multiprocessing.spawn.get_preparation_data
    if getattr(original, "names_this_file", False):
        return

    def get_preparation_data(name: str) -> dict[str, Any]:
        data = original(name)
        if name.startswith(_NAME_OF_WORKERS):
            data.pop("init_main_from_path", None)
            data["init_main_from_name"] = "train.data.workers.worker_process"
        return data

    get_preparation_data.names_this_file = True  # type: ignore[attr-defined]
    multiprocessing.spawn.get_preparation_data = get_preparation_data


def _forbid_jax() -> None:
    sys.modules["jax"] = None  # type: ignore[assignment]
    logging.getLogger("absl").addFilter(_is_about_something_else)


def _is_about_something_else(record: logging.LogRecord) -> bool:
    """Grain warns in every worker that jax's profiler is missing there. That is the point."""
    return "jax profiler" not in record.getMessage()


if __name__ == "__mp_main__" and multiprocessing.current_process().name.startswith(_NAME_OF_WORKERS):
    _forbid_jax()

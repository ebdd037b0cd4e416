"""What a data-loading worker process must not do: import jax.

Grain starts its workers as fresh interpreters, and imports jax in each of them for tree functions it can do without:
2 seconds and 150 MB a worker, and on a TPU host one careless call away from a fight over the chips. A worker runs
the program's main module again before it imports Grain, so `train/__init__.py` has the first word and calls this.
"""

import logging
import multiprocessing
import sys

_NAME_OF_GRAINS_WORKERS = "grain-process-prefetch"


def keep_jax_out_of_workers() -> None:
    """In a data-loading worker, makes `import jax` fail, upon which Grain takes the `tree` package. Else nothing."""
    if multiprocessing.current_process().name.startswith(_NAME_OF_GRAINS_WORKERS) and "jax" not in sys.modules:
        sys.modules["jax"] = None  # type: ignore[assignment]
        logging.getLogger("absl").addFilter(_is_about_something_else)


def _is_about_something_else(record: logging.LogRecord) -> bool:
    """Grain warns in every worker that jax's profiler is missing there. That is the point."""
    return "jax profiler" not in record.getMessage()

"""The command line `python -m train`.

Nothing here imports jax before a command runs, because data-loading workers import this file too.
"""

import atexit
import os
import sys
import traceback
from typing import NoReturn

from poolformer_jax.process import exit_on_interrupt, prepare_streams


def _exit(code: int, *, failed: bool) -> NoReturn:
    """Exits; if the run failed, without waiting for what may never end.

    Threads of Orbax wait five minutes for a folder that could not be made. Other processes that are still running would
    hang in jax's shutdown barrier, which is one of the exit functions.
    """
    if failed:
        distributed = sys.modules.get("train.compute.distributed")  # missing if the error came before its import
        if distributed is None or not distributed.has_other_processes():
            atexit._run_exitfuncs()  # such as those that free shared memory
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    prepare_streams()
    with exit_on_interrupt("stopped"):
        from train.command_line import main
        from train.failures import DIVERGED
    try:
        code = main(sys.argv[1:])
    except Exception:
        traceback.print_exc()
        code = 1
    # Success and divergence end all processes at the same step.
    _exit(code, failed=code not in (0, DIVERGED))

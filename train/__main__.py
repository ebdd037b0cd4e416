"""The command line `python -m train`.

Nothing here imports jax before a command runs, because data-loading workers import this file too.
"""

import os
import sys
import traceback
from typing import NoReturn

from poolformer_jax.process import exit_on_interrupt, prepare_streams


def _exit(code: int, *, others_running: bool) -> NoReturn:
    """Exits, without jax's shutdown barrier if other processes are still running: they would hang in it."""
    distributed = sys.modules.get("train.compute.distributed")  # missing if the error came before its import
    if others_running and distributed is not None and distributed.has_other_processes():
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
    _exit(code, others_running=code not in (0, DIVERGED))

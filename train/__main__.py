"""The command line `python -m train`.

Nothing here imports jax before a command runs, because data-loading workers import this file too.
"""

import os
import sys
import traceback
from typing import NoReturn

from poolformer_jax.process import exit_on_interrupt, open_missing_streams


def _exit(code: int, failed_alone: bool) -> NoReturn:
    """Exits. If only this process failed, skips jax's shutdown barrier, in which the others would hang."""
    distributed = sys.modules.get("train.compute.distributed")  # missing if the error came before its import
    if failed_alone and distributed is not None and distributed.has_other_processes():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    open_missing_streams()
    with exit_on_interrupt("stopped"):
        from train.command_line import DIVERGED, main
    try:
        code = main(sys.argv[1:])
    except Exception:
        traceback.print_exc()
        code = 1
    # A divergence ends all processes at the same step, each with its message.
    _exit(code, failed_alone=code not in (0, DIVERGED))

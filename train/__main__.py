"""The command line `python -m train`.

Nothing here imports jax before a command runs: data-loading workers run this file again.
"""

import os
import sys
import traceback
from typing import NoReturn

from poolformer_jax.process import exit_on_interrupt, open_missing_streams


def _end(code: int, alone: bool) -> NoReturn:
    """Ends the program. Where it failed alone amid others, without jax's waiting for them: they wait for it."""
    distributed = sys.modules.get("train.compute.distributed")  # not there if the program did not come so far
    if alone and distributed is not None and distributed.others_depend_on_this():
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
    # To a divergence all processes come at one step, and all of them are to say so.
    _end(code, alone=code not in (0, DIVERGED))

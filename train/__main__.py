"""The command line `python -m train`.

Nothing here imports jax before a command runs: data-loading workers run this file again.
"""

import os
import signal
import sys


def _leave(number: int, frame: object) -> None:
    """Until a command begins there is nothing to put in order, and an exception amid imports may get lost."""
    os.write(sys.stderr.fileno(), b"\nstopped\n")
    os._exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, _leave)
    from train.command_line import main

    sys.exit(main(sys.argv[1:]))

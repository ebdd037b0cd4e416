"""The command line `python -m train`.

Nothing here imports jax before a command runs: data-loading workers run this file again.
"""

import sys

from train.command_line import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m convert`; the command line is in `command_line`."""

import sys

from poolformer_jax.process import exit_on_interrupt, prepare_streams

if __name__ == "__main__":
    prepare_streams()
    with exit_on_interrupt():
        from convert.command_line import main
    sys.exit(main())

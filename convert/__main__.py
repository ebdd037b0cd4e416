"""`python -m convert`; the command line is in `command_line`."""

import sys

from poolformer_jax.interrupts import leaving_at_once
from poolformer_jax.streams import open_missing_streams

if __name__ == "__main__":
    open_missing_streams()
    with leaving_at_once():
        from convert.command_line import main
    sys.exit(main())

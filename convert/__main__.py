"""`python -m convert`; the command line is in `command_line`."""

import sys

from poolformer_jax.interrupts import leaving_at_once

if __name__ == "__main__":
    with leaving_at_once():
        from convert.command_line import main
    sys.exit(main())

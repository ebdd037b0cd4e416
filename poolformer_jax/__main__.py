"""`python -m poolformer_jax`; the commands are in `cli`."""

import sys

from poolformer_jax.interrupts import leaving_at_once
from poolformer_jax.streams import open_missing_streams

if __name__ == "__main__":
    open_missing_streams()
    with leaving_at_once():
        from poolformer_jax.cli import main
    sys.exit(main())

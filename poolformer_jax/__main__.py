"""`python -m poolformer_jax`; the commands are in `cli`."""

import sys

from poolformer_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())

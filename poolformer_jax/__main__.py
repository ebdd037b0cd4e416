"""`python -m poolformer_jax`; the commands are in `cli`."""

import sys

from poolformer_jax.process import exit_on_interrupt, prepare_streams

if __name__ == "__main__":
    prepare_streams()
    with exit_on_interrupt():
        from poolformer_jax.cli import main
    sys.exit(main())

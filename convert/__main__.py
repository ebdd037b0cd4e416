"""`python -m convert`; the command line is in `command_line`."""

import sys

from convert.command_line import main

if __name__ == "__main__":
    sys.exit(main())

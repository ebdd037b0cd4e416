"""Standard streams where a program was started without them."""

import os
import sys


def open_missing_streams() -> None:
    """Lets a program print, to nobody, where stdout or stderr was closed before it began (`2>&-`, some daemons).

    Python has None in their place, which most programs, libraries among them, meet for the first time in a service.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))

"""How programs end by Ctrl-C."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def leaving_at_once(last_words: str = "") -> Iterator[None]:
    """Lets Ctrl-C end the process with exit code 130, saying `last_words` and nothing else, until the block ends.

    For imports: there is nothing to put in order yet, and an exception gets lost in the extension modules of others, or
    becomes another one. A signal that is ignored, as by a shell's background jobs, or handled already stays so.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: FrameType | None) -> None:
        start = "\n" if sys.stderr.isatty() else ""  # where a line may say what is waited for
        end = f"{last_words}\n" if last_words else ""
        os.write(sys.stderr.fileno(), (start + end).encode())
        os._exit(128 + number)

    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def code_of_interruption() -> int:
    """130, the exit code of a program that has caught a KeyboardInterrupt and ends for it.

    CPython remembers a KeyboardInterrupt that left the `exec` of a string, as dataclasses are made of, also where it
    was caught afterwards, and ends the process by the signal itself. The next `exec` makes it forget.
    """
    exec("")
    return 128 + signal.SIGINT

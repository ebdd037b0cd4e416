"""The screen of a program: its warnings are on it, and what Orbax says more than once is not."""

import functools
import logging
import sys
import traceback
from collections.abc import Callable

from rich.console import Console
from rich.logging import RichHandler


def console() -> Console:
    """Where a person looks, with the program's warnings on it: above a progress bar, not through it."""
    console = Console(stderr=True)
    handler = RichHandler(console=console, show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    _hear_orbax_once()
    return console


def _hear_orbax_once() -> None:
    """Leaves out what Orbax and the writes that it gives up say, with pages of traceback, beside the error they raise.

    When one of its many writes fails, Orbax raises that error, which this program tells in a sentence, and logs it. It
    also closes its event loop. Writes that fail later then have nobody to tell: asyncio logs their errors, and
    TensorStore's threads cannot deliver theirs to the closed loop.
    """
    logging.getLogger("absl").addFilter(_is_not_by_orbax)
    logging.getLogger("asyncio").addFilter(_did_not_go_through_orbax)
    if getattr(sys.unraisablehook, "func", None) is not _tell_unless_for_a_closed_loop:
        sys.unraisablehook = functools.partial(_tell_unless_for_a_closed_loop, sys.unraisablehook)


def _is_not_by_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _did_not_go_through_orbax(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return error is None or not any("orbax" in frame.filename for frame in traceback.extract_tb(error.__traceback__))


def _tell_unless_for_a_closed_loop(
    tell: Callable[["sys.UnraisableHookArgs"], object], unraisable: "sys.UnraisableHookArgs"
) -> None:
    # asyncio has no type of its own for it; TensorStore names no object.
    if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
        tell(unraisable)

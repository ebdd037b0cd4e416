"""The process that a program runs in: Ctrl-C, standard streams, error messages, and forks. Imports no jax."""

import functools
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from poolformer_jax.errors import InputError, PoolFormerError
from poolformer_jax.messages import printable_message

_COMMAND = re.compile(r"\b(python|pip|git|docker) ")
# Exit codes of the programs; argparse exits with 2 on wrong usage.
DONE, FAILED, INTERRUPTED = 0, 1, 128 + signal.SIGINT

_ACCELERATORS = {"cuda": ("NVIDIA GPU", "cuda12 or cuda13"), "gpu": ("GPU", "cuda12 or cuda13"), "tpu": ("TPU", "tpu")}


@contextmanager
def exit_on_interrupt(message: str = "") -> Iterator[None]:
    """Makes Ctrl-C exit with code 130 at once, printing only `message`, until the block ends.

    For imports: extension modules lose a KeyboardInterrupt, or turn it into another exception. Does nothing if SIGINT
    is ignored, as in a shell's background jobs, or already handled.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(*_: Any) -> None:
        start = "\n" if sys.stderr.isatty() else ""  # ends the line of `cli.arguments.waiting`
        end = f"{message}\n" if message else ""
        os.write(sys.stderr.fileno(), (start + end).encode())
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def prepare_streams() -> None:
    """Lets stdout and stderr take any text, wherever they lead.

    Where a stream was closed before the program started (`2>&-`, some daemons), it is None in Python, and most
    libraries fail when they print: opens /dev/null. Characters that stdout's encoding lacks, and bytes of a file name
    that are not UTF-8, are printed with a backslash, as Python does on stderr.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")


def run_program(program: Callable[[], int]) -> int:
    """The exit code of `program`: its own, or that of Ctrl-C or of an error, whose message is printed.

    An exception that looks like a bug passes.
    """
    try:
        return program()
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if (message := error_message(error)) is None:
            raise
        print_error(message)
        return FAILED


def error_message(error: Exception) -> str | None:
    """The message to print instead of a traceback; None if this looks like a bug."""
    if isinstance(error, PoolFormerError):
        return str(error)
    if isinstance(error, OSError):
        named = str(error) if error.filename is None else f"{os.fsdecode(error.filename)}: {error.strerror}"
        return printable_message(named)
    return _missing_device(error)


def print_error(message: str, kind: str = "error") -> None:
    """Prints an error, or a message of another `kind`, on stderr.

    On a terminal, lines break between words, except those with a command to copy. In a file or a pipe a message keeps
    its lines, as programs that search for it expect.
    """
    lines = f"{kind}: {message}".split("\n")
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        wrap = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False, subsequent_indent="  ").fill
        lines = [line if _COMMAND.search(line) else wrap(line) for line in lines]
    print("\n".join(lines), file=sys.stderr)


def _missing_device(error: Exception) -> str | None:
    """The message if jax finds no device of the platforms in JAX_PLATFORMS; jax has no exception type for that."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    known = [_ACCELERATORS[name] for name in platforms.lower().split(",") if name in _ACCELERATORS]
    if not isinstance(error, AssertionError | RuntimeError) or not known:
        return None
    import jax

    try:
        jax.devices()
    except (AssertionError, RuntimeError):
        device, extra = known[0]
        return (
            f"JAX_PLATFORMS={platforms}: jax sees no {device}. Support is installed by the extra {extra}: pip install "
            f"-e '.[{extra.split()[0]}]'. Without JAX_PLATFORMS, jax uses the best device that it sees. {error}"
        ).rstrip()
    return None


@functools.cache
def process_of_jax() -> int:
    """The process in which this package first used jax's devices; processes forked from it get the same number."""
    return os.getpid()


def check_not_forked() -> None:
    """Raises InputError in a process that was forked after this package used jax's devices.

    jax has threads, which do not exist in a forked process: it would wait for them forever.
    """
    if os.getpid() != process_of_jax():
        raise InputError(
            f"jax was used in process {process_of_jax()}, and process {os.getpid()} was forked from it, where jax "
            'cannot run. Start processes with multiprocessing.get_context("spawn"), or before jax is used, and make '
            "the classifier in each of them."
        )

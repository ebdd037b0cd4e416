"""The errors that a person can fix. Programs print their message; any other exception is a bug and keeps its traceback.

Each also derives from the built-in exception that callers would catch.
"""

from poolformer_jax.messages import printable_message


class PoolFormerError(Exception):
    """Base class of every error whose message says what was given, what was expected, and how to fix it.

    Messages quote names and values from files: control characters are escaped, and long messages shortened.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(printable_message(part) if isinstance(part, str) else part for part in args))


class InputError(PoolFormerError, ValueError):
    """An argument, a config, a file or a data set that cannot be used as it is."""


class MissingFileError(PoolFormerError, FileNotFoundError):
    """A file, folder or model that does not exist."""


class MissingDependencyError(PoolFormerError, ModuleNotFoundError):
    """An optional package that is not installed; the message names the extra that installs it."""

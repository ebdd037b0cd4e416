"""Makes text from files printable: short, without control characters, in time linear in the file's size.

A file may hold text of any length, characters that a terminal acts on, numbers of a million digits, and containers
that share their parts: 300 bytes of pickle can nest to 2**100 lists. `printable` is for text, `short_repr` for any
value, and `printable_message` is applied to every error that a program prints.
"""

import os
import re
import reprlib
from collections.abc import Sequence

MAX_MESSAGE = 2_000  # characters
_END_OF_MESSAGE = 600  # where a message says what was expected
_FORMULA = re.compile(r"[=@]|[+-](?![\d.]+$)")  # how one begins; -1 is a number
_LARGEST_INTEGER = 4_096  # bits; repr() refuses integers of more than 4,300 digits


class _ShortRepr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        # Shared parts are repeated, at most 12 * 12 times.
        self.maxlevel, self.maxlist, self.maxtuple = 2, 12, 12
        self.maxstring = self.maxother = 80

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() <= _LARGEST_INTEGER else f"<{x.bit_length():,} bits>"


_SHORT_REPR = _ShortRepr()


def printable(text: str | bytes | os.PathLike[str], limit: int = 100) -> str:
    """Text from a file, or a file's name, on one line.

    Args:
        text: it may hold anything; bytes of a file name that are not UTF-8 become `\\xe9`.
        limit: the most characters to return; a longer text ends with "...".
    """
    whole = os.fsdecode(text)
    escaped = "".join(map(_escape, whole[:limit]))
    return escaped if len(whole) <= limit and len(escaped) <= limit else escaped[: limit - 3] + "..."


def csv_cell(text: str | bytes | os.PathLike[str]) -> str:
    """`printable` text for a CSV file. A spreadsheet computes "=1+1"; with an apostrophe before it, it does not."""
    cell = printable(text, MAX_MESSAGE)
    return f"'{cell}" if _FORMULA.match(cell) else cell


def short_repr(value: object, limit: int = 400) -> str:
    """repr() shortened to `limit` characters, whatever `value` nests or shares."""
    return printable(_SHORT_REPR.repr(value), limit)


def first_few(names: Sequence[str], count: int = 5) -> str:
    """The first `count` names, and the number of the others: "a, b and 7 more"."""
    more = f" and {len(names) - count:,} more" if len(names) > count else ""
    return ", ".join(map(printable, names[:count])) + more


def printable_message(message: str) -> str:
    """A message of several lines, without control characters and with at most `MAX_MESSAGE` characters."""
    if len(message) <= MAX_MESSAGE and len(whole := _escape_lines(message)) <= MAX_MESSAGE:
        return whole
    begin, end = _escape_lines(message[:MAX_MESSAGE]), _escape_lines(message[-_END_OF_MESSAGE:])
    return f"{begin[: MAX_MESSAGE - _END_OF_MESSAGE - 10]} ... {end[-_END_OF_MESSAGE:]}"


def _escape_lines(text: str) -> str:
    return "".join(character if character == "\n" else _escape(character) for character in text)


def _escape(character: str) -> str:
    if character.isprintable():
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name, as Python decodes it
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()

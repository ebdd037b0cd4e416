"""The error for weights that do not fit a network: every name and shape at once, each with the nearest name."""

import difflib
from collections.abc import Iterable, Mapping, Sequence

from poolformer_jax.errors import InputError
from poolformer_jax.messages import printable

_MOST_LINES = 20  # of each kind, in a message
# Names that are compared to find the nearest one, and their characters: comparing takes time with the square of the
# length, and a damaged or hostile file has names of any length.
_MOST_NAMES, _MOST_CHARACTERS = 2000, 120


class WeightsMismatch(InputError):
    """Names or shapes of weights that are not those of the network.

    Attributes:
        missing: names the network needs and the weights lack, with the shape.
        unexpected: names the network has no place for, with the shape.
        misshaped: names that fit, with the shape given and the shape expected.
    """

    def __init__(
        self,
        what: str,
        missing: Mapping[str, Sequence[int]],
        unexpected: Mapping[str, Sequence[int]],
        misshaped: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    ) -> None:
        self.missing, self.unexpected, self.misshaped = dict(missing), dict(unexpected), dict(misshaped)
        lines = [
            *_lines("missing", len(missing), (_line(n, s) + _nearest(n, unexpected) for n, s in missing.items())),
            *_lines("unexpected", len(unexpected), (_line(n, s) + _nearest(n, missing) for n, s in unexpected.items())),
            *_lines(
                "misshaped",
                len(misshaped),
                (f"{_line(name, given)}, expected {list(wanted)}" for name, (given, wanted) in misshaped.items()),
            ),
        ]
        super().__init__(f"{what}\n" + "\n".join(lines))


def check_names_and_shapes(what: str, given: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]) -> None:
    """Compares shapes by name.

    `what` is the first line of the message. Raises WeightsMismatch, naming everything that is missing, unexpected or
    misshaped.
    """
    missing = {name: shape for name, shape in wanted.items() if name not in given}
    unexpected = {name: shape for name, shape in given.items() if name not in wanted}
    both = {name: (given[name], shape) for name, shape in wanted.items() if name in given}
    misshaped = {name: (here, there) for name, (here, there) in both.items() if here != there}
    if missing or unexpected or misshaped:
        raise WeightsMismatch(what, missing, unexpected, misshaped)


def _line(name: str, shape: Sequence[int]) -> str:
    return f"{printable(name)} {list(shape)}"


def _nearest(name: str, names: Iterable[str]) -> str:
    comparable = [other for other in names if len(other) <= _MOST_CHARACTERS][:_MOST_NAMES]
    near = difflib.get_close_matches(name[:_MOST_CHARACTERS], comparable, n=1, cutoff=0.7)
    return f"; the nearest name on the other side is {printable(near[0])}" if near else ""


def _lines(kind: str, count: int, texts: Iterable[str]) -> list[str]:
    lines = [f"  {kind}: {text}" for text, _ in zip(texts, range(_MOST_LINES))]
    return [*lines, f"  {kind}: and {count - _MOST_LINES} more"] if count > _MOST_LINES else lines

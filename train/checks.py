"""How a configuration refuses values it cannot work with: everything wrong at once."""

from collections.abc import Sequence


def refuse(config: object, rules: Sequence[tuple[str, object, str]]) -> None:
    """Raises one ValueError that names every field whose rule (name, whether it holds, expectation) does not hold."""
    problems = [f"{name}={getattr(config, name)!r}: expected {wanted}." for name, good, wanted in rules if not good]
    if problems:
        raise ValueError(f"{type(config).__name__} cannot work:\n  " + "\n  ".join(problems))


def is_none_or_positive(value: float | None) -> bool:
    """Whether a field that may be None holds a number above 0 where it is not. `value or 1` takes 0 for None."""
    return value is None or value > 0

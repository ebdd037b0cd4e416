"""How a configuration refuses values it cannot work with: everything wrong at once."""

from collections.abc import Sequence
from pathlib import Path


def refuse(config: object, rules: Sequence[tuple[str, object, str]]) -> None:
    """Raises one ValueError that names every field whose rule (name, whether it holds, expectation) does not hold."""
    problems = [f"{name}={getattr(config, name)!r}: expected {wanted}." for name, good, wanted in rules if not good]
    if problems:
        raise ValueError(f"{type(config).__name__} cannot work:\n  " + "\n  ".join(problems))


def is_none_or_positive(value: float | None) -> bool:
    """Whether a field that may be None holds a number above 0 where it is not. `value or 1` takes 0 for None."""
    return value is None or value > 0


def refuse_run_folder(source: str) -> None:
    """Raises ValueError where the folder of a run is given for that of the model in it."""
    folder = Path(source).expanduser()
    if (folder / "recipe.json").is_file() and not (folder / "config.json").is_file():
        when = "" if (folder / "model").is_dir() else ", which is there once the run has ended"
        raise ValueError(f"{source} is the folder of a run. Expected that of its model: {folder / 'model'}{when}.")

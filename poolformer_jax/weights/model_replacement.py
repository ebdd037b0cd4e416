"""Replaces the model in a folder, whole or not at all.

A new folder appears by one rename. In an existing folder, files are replaced one by one: the old weights are moved away
first and the new ones moved in last. After an error the old files are moved back. A program that is killed in between
leaves a folder without weights, never one with parts of two models; the next save there first moves the old ones back.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from poolformer_jax.errors import InputError
from poolformer_jax.files import naming_destination, remove_abandoned, staging_folder, sync, why_unreadable
from poolformer_jax.images import PREPROCESSOR_CONFIG
from poolformer_jax.weights.model_card import GENERATED, MODEL_CARD
from poolformer_jax.weights.model_files import WEIGHTS

_LARGEST_CARD = 1 << 22  # bytes
# What a staging folder holds: the new model, and while it replaces an old one that model's files, and the names of the
# new files.
_MODEL, _OLD, _NAMES, _DONE = "model", "old", "names", "done"


@contextmanager
def staged_model(target: Path, weights: str, described_by: Sequence[str] = ()) -> Iterator[Path]:
    """A folder for the model's files. When the block ends it becomes `target`, or they replace those in `target`.

    Files with the names `described_by` describe an old model in `target`, and are removed with it.
    """
    with naming_destination(target):
        existing = [name for name in WEIGHTS if (target / name).exists()]
        if others := [name for name in existing if name != weights]:
            raise InputError(
                f"{target} already has other weights ({', '.join(others)}), which could be loaded instead of these. "
                "Expected a new folder, or one with a model of the same layout."
            )
        place = target.resolve()
        # In the target or beside it: on its file system, where files can be renamed into place.
        where = place if place.exists() else place.parent
        if where == place:
            remove_abandoned(place.parent, _put_back)  # of a program that was killed when it had made `place`
        with staging_folder(where, _put_back) as stage:
            model = stage / _MODEL
            model.mkdir()
            yield model
            remove_abandoned(model)
            for file in (*model.iterdir(), model):
                sync(file)
            if where == place:
                if _is_users(place / MODEL_CARD):
                    (model / MODEL_CARD).unlink(missing_ok=True)
                _move_in(stage, [weights, PREPROCESSOR_CONFIG, *described_by] if existing else [], weights)
            else:
                model.rename(place)
            sync(where)


def _move_in(stage: Path, removed: Sequence[str], weights: str) -> None:
    """Replaces the files of the model around `stage`: the old weights go first and the new ones come last."""
    place = stage.parent
    new = sorted((file.name for file in (stage / _MODEL).iterdir()), key=lambda name: name == weights)
    (stage / _OLD).mkdir()
    (stage / _NAMES).mkdir()
    for name in new:
        (stage / _NAMES / name).touch()
    for name in dict.fromkeys([*removed, *new]):
        if (place / name).exists():
            (place / name).replace(stage / _OLD / name)
    for name in new:
        (stage / _MODEL / name).replace(place / name)
    sync(place)
    (stage / _NAMES).rename(stage / _DONE)  # from here on the new model counts


def _put_back(stage: Path) -> None:
    """Puts back the files of an old model that `_move_in` did not replace to the end; the new files go first."""
    parts = [stage / name for name in (_MODEL, _OLD, _NAMES)]
    # A stranger's model folder may hold anything.
    if not all(part.is_dir() and not part.is_symlink() for part in parts):
        return
    waiting, kept, new = ([file.name for file in part.iterdir()] for part in parts)
    for name in sorted(set(new).difference(waiting), key=lambda name: name not in WEIGHTS):
        (stage.parent / name).unlink(missing_ok=True)
    for name in sorted(kept, key=lambda name: name in WEIGHTS):
        (stage / _OLD / name).replace(stage.parent / name)
    sync(stage.parent)
    (stage / _NAMES).rename(stage / _DONE)


def _is_users(card: Path) -> bool:
    """True for a README.md that `model_card` did not write, or that was edited since."""
    if not card.exists():
        return False
    return why_unreadable(card, _LARGEST_CARD) is not None or GENERATED not in card.read_text("utf-8", "replace")

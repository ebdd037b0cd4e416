"""What a data set of `python -m train prepare` was packed from, noted beside its shards in `fingerprint.json`.

Shards say nothing of where they come from: those of other files, or of other settings, would be taken for finished.
"""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from poolformer_jax.files import write_json
from train.data.sources.folders import FolderSource
from train.data.sources.source import Source, SourceError, digest_of

_FILE = "fingerprint.json"


class Origin:
    """The files of a data set, and the settings that decide what its shards hold.

    Args:
        name: of the source, as it was given.
        splits: the examples of every split.
        settings: their names and values, JSON-ready.
        threads: how many files are looked at at the same time.
    """

    def __init__(self, name: str, splits: Mapping[str, Source], settings: Mapping[str, Any], threads: int) -> None:
        self._name, self._splits, self._settings, self._threads = name, splits, dict(settings), threads
        examples = {split: source.digest for split, source in splits.items()}
        self._begun = {"examples": examples, **self._settings}

    def claim(self, folder: Path) -> None:
        """Notes in the folder of an unfinished data set that its shards are of these examples.

        Raises:
            SourceError: if it holds shards of others.
        """
        noted = _read(folder)
        if noted is None:
            write_json(folder / _FILE, self._begun)
        elif {name: noted.get(name) for name in self._begun} != self._begun:
            raise SourceError(
                f"{folder} holds shards of other files than {self._name} has now, or of other settings. Remove that "
                "folder to start again, or choose another --output."
            )

    def note(self, folder: Path) -> None:
        """Notes what a finished data set was packed from.

        Only now with the sizes of files: while a data set is unfinished, one that is no image may be replaced.
        """
        write_json(folder / _FILE, self._begun | {"sizes": self._sizes()})

    def compare(self, folder: Path) -> None:
        """Makes sure that a finished data set was packed from these very files, with these settings.

        Raises:
            SourceError: with what differs.
        """
        noted = _read(folder) or {}
        different = [
            f"{name}: packed with {noted.get(name)}, now {value}"
            for name, value in self._settings.items()
            if noted.get(name) != value
        ]
        if noted.get("examples") != self._begun["examples"] or noted.get("sizes") != self._sizes():
            different.append(f"files: classes, names, sizes or splits are not those of {self._name}")
        if different:
            raise SourceError(
                f"{folder} holds a data set of other files than {self._name} has now, or of other settings. What "
                "differs:\n  " + "\n  ".join(different) + "\nRemove that folder to pack again, or choose another "
                "--output or --name."
            )

    def _sizes(self) -> str:
        """Digest of the bytes of every image file, 0 for one that is not there."""
        return digest_of(None, *(_sizes(source, self._threads) for source in self._splits.values()))


def require_note(folder: Path) -> None:
    """Makes sure that a finished data set says what it was packed from.

    Raises:
        SourceError: if it does not.
    """
    if _read(folder) is None:
        raise SourceError(
            f"{folder} holds a data set that does not say which files it was packed from: another program made it, or "
            f"a version of this one that did not note it. Train on it as it is with --data.source tfds:{folder}, or "
            "remove the folder to pack again, or choose another --output or --name."
        )


def _sizes(source: Source, threads: int) -> np.ndarray:
    """Bytes of every image file: int64 [n]."""
    if not isinstance(source, FolderSource):
        return source.sizes  # type: ignore[attr-defined]
    with ThreadPoolExecutor(threads) as pool:
        return np.fromiter(pool.map(source.size_of, range(len(source))), np.int64, len(source))


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / _FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

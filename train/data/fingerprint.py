"""What a packed data set was made from: the source's files and the settings, as `fingerprint.json` beside the shards.

Without it, shards of other files or settings would count as finished.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from poolformer_jax.files import read_json, write_json
from train.data.sources.archives import ArchiveSource
from train.data.sources.folders import FolderSource
from train.data.sources.parquet import ParquetSource
from train.data.sources.source import Source, SourceError, digest_of

Fingerprint = dict[str, Any]
_FILE = "fingerprint.json"


def fingerprint_of(splits: Mapping[str, Source], images_per_shard: int) -> Fingerprint:
    """The names and labels of a source's examples and the settings that decide what its shards hold.

    File sizes are added when the data set is finished: until then, a file that cannot be read may be replaced.
    """
    return {
        "examples": {split: source.digest for split, source in splits.items()},
        "images_per_shard": images_per_shard,
    }


def file_sizes(splits: Mapping[str, Source], threads: int) -> Fingerprint:
    """A digest of the size of every image file."""
    return {"sizes": digest_of(None, *(_sizes(source, threads) for source in splits.values()))}


def read_fingerprint(folder: Path) -> Fingerprint | None:
    """The fingerprint in a folder; None if it has none."""
    path = folder / _FILE
    return read_json(path, "the fingerprint that prepare writes") if path.is_file() else None


def write_fingerprint(folder: Path, fingerprint: Fingerprint) -> None:
    """Writes the fingerprint beside the shards in `folder`."""
    write_json(folder / _FILE, fingerprint)


def check_fingerprint(folder: Path, source: str, fingerprint: Fingerprint, found: Fingerprint) -> None:
    """Raises SourceError if the `found` fingerprint of `folder` differs from that of the source now."""
    different = []
    if (packed := found.get("images_per_shard")) != (now := fingerprint["images_per_shard"]):
        different.append(f"images_per_shard: packed with {packed}, now {now}")
    if any(found.get(name) != fingerprint[name] for name in fingerprint.keys() - {"images_per_shard"}):
        different.append(f"files: classes, names, sizes or splits differ from those of {source}")
    if different:
        raise SourceError(
            f"{folder} was packed from other files than {source} has now, or with other settings:\n  "
            + "\n  ".join(different)
            + "\nRemove that folder to pack again, or choose another --output or --name."
        )


def _sizes(source: Source, threads: int) -> np.ndarray:
    """Bytes of every image file, or of every Parquet file: int64."""
    if isinstance(source, ArchiveSource):
        return source.sizes
    if isinstance(source, ParquetSource):
        return source.file_sizes
    assert isinstance(source, FolderSource)
    with ThreadPoolExecutor(threads) as pool:
        return np.fromiter(pool.map(source.size_of, range(len(source))), np.int64, len(source))

"""The files of a packed data set: ArrayRecord shards, and TFDS's metadata beside them.

A shard is written under another name and renamed when it is complete. The files that it leaves out, because they cannot
be read, are listed in a file that is written before it.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from poolformer_jax.files import sync, write_json
from poolformer_jax.images import ImageError, read_image
from poolformer_jax.messages import MAX_MESSAGE, printable
from train.data.prepare_config import VERSION, PrepareConfig
from train.data.sources.folders import FolderSource
from train.data.sources.source import Example, Source, SourceError, image_of

_SHUFFLE_SEED = 0
_LEFT_OUT = "left_out"
# One record per group, so that random access reads nothing else; JPEGs do not compress further.
_WRITER_OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class Progress:
    """Progress of listing or packing."""

    images: int
    """Found so far while the source is listed, packed so far afterwards."""
    total_images: int | None
    """None while the source is listed."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """Shard `number` of the `of` shards of a split, with the examples `rows`."""

    split: str
    number: int
    of: int
    rows: np.ndarray

    def path(self, folder: Path, name: str) -> Path:
        """The file in `folder` of the data set `name`."""
        return folder / f"{name}-{self.split}.array_record-{self.number:05d}-of-{self.of:05d}"

    def note(self, folder: Path) -> Path:
        """The file that lists what the shard leaves out, if anything; written before the shard."""
        return folder / _LEFT_OUT / f"{self.split}-{self.number:05d}-of-{self.of:05d}.json"


def shards_of(config: PrepareConfig, sources: Mapping[str, Source]) -> list[Shard]:
    """All shards, which hold the examples in one shuffled order."""
    return [shard for split, source in sources.items() for shard in _split_shards(split, len(source), config)]


def _split_shards(split: str, examples: int, config: PrepareConfig) -> Iterator[Shard]:
    order = np.random.default_rng(_SHUFFLE_SEED).permutation(examples)
    count = -(-examples // config.images_per_shard)
    for number, rows in enumerate(np.array_split(order, count)):
        yield Shard(split, number, count, rows)


def files_left_out(config: PrepareConfig, shards: list[Shard], folder: Path) -> list[str]:
    """Files that the finished shards in a folder leave out because they cannot be read, each with the reason."""
    lists = [shard.note(folder) for shard in shards if shard.path(folder, config.dataset_name).exists()]
    return sorted(name for path in lists if path.exists() for name in json.loads(path.read_text(encoding="utf-8")))


def write_missing(
    config: PrepareConfig,
    sources: Mapping[str, Source],
    shards: list[Shard],
    work: Path,
    on_progress: Callable[[Progress], None],
) -> None:
    """Writes the shards that are missing.

    Raises:
        SourceError: with all files that cannot be read, if on_bad_image is "error".
    """
    total = sum(len(shard.rows) for shard in shards)
    missing = [shard for shard in shards if not shard.path(work, config.dataset_name).exists()]
    images = total - sum(len(shard.rows) for shard in missing)
    on_progress(Progress(images, total))
    bad: list[str] = []
    # Made before the threads start: TFDS imports its modules lazily, which is not safe in several threads.
    features = {split: _features(source) for split, source in sources.items()}
    with ThreadPoolExecutor(config.threads) as threads:
        try:
            tasks = {
                threads.submit(_write_shard, config, sources[shard.split], features[shard.split], shard, work): shard
                for shard in missing
            }
            for task in as_completed(tasks):
                bad += task.result()
                images += len(tasks[task].rows)
                on_progress(Progress(images, total))
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    if bad and config.on_bad_image == "error":
        raise SourceError(
            f"{len(bad)} {'file' if len(bad) == 1 else 'files'} cannot be read as images:\n  "
            + "\n  ".join(sorted(bad))
            + "\nReplace or remove them and run the "
            "command again (finished shards stay), or leave them out with --on-bad-image skip."
        )


def _write_shard(config: PrepareConfig, source: Source, features: Any, shard: Shard, work: Path) -> list[str]:
    """Writes one shard, complete or not at all. Returns the files that cannot be read, each with the reason."""
    path = shard.path(work, config.dataset_name)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        bad = _write_records(temporary, source, features, shard)
    except RuntimeError as error:  # ArrayRecord's for any error of the disk
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"Cannot write {path}: {error}. Free space or repair the disk, and run the command again: finished shards "
            "stay."
        ) from error
    if bad and config.on_bad_image == "error":
        temporary.unlink()
        return bad
    if bad:
        write_json(shard.note(work), bad)
    else:
        shard.note(work).unlink(missing_ok=True)  # left by an interrupted run
    sync(temporary)
    temporary.rename(path)
    return bad


def _write_records(path: Path, source: Source, features: Any, shard: Shard) -> list[str]:
    """Writes the readable examples of a shard, and returns the others, each with the reason."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), _WRITER_OPTIONS)
    bad = []
    try:
        for row in shard.rows:
            example = source[int(row)]
            if (reason := _why_unreadable(example)) is not None:
                bad.append(f"{example['id']}: {reason}")
                continue
            name = (
                printable(source.names[row].item(), MAX_MESSAGE) if isinstance(source, FolderSource) else example["id"]
            )
            record = {"image": example["image"], "label": example["label"], "file_name": name}
            writer.write(features.serialize_example(features.encode_example(record)))
    finally:
        writer.close()
    if (written := ArrayRecordReader(str(path)).num_records()) != len(shard.rows) - len(bad):
        raise RuntimeError(f"it holds {written} of {len(shard.rows) - len(bad)} images")
    return bad


def _why_unreadable(example: Example) -> str | None:
    """The reason why an example cannot be read; None if it can. A header alone does not show that a file is cut off."""
    try:
        read_image(image_of(example))
    except ImageError as error:
        return str(error)
    return None


def _features(source: Source) -> Any:
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=list(source.class_names)),
            "file_name": tfds.features.Text(),
        }
    )


def write_metadata(config: PrepareConfig, sources: Mapping[str, Source], shards: list[Shard], work: Path) -> None:
    """Writes the files of TFDS that describe the finished shards in `work`."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordReader

    splits = []
    for split in sources:
        paths = [shard.path(work, config.dataset_name) for shard in shards if shard.split == split]
        lengths = [ArrayRecordReader(str(path)).num_records() for path in paths]
        size = sum(path.stat().st_size for path in paths)
        splits.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size))
    tfds.folder_dataset.write_metadata(
        data_dir=work,
        features=_features(next(iter(sources.values()))),
        split_infos=splits,
        version=VERSION,
        filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        check_data=False,  # its check needs TensorFlow
        description=f"Packed from {config.source.partition(':')[0]} by poolformer-jax.",
    )

"""`python -m train prepare`: packs class folders or ImageNet's archives into TFDS's ArrayRecord shards.

A pod's storage reads a thousand large files well and a million small ones badly. Images keep their bytes. The result is
an ordinary TFDS data set, which `tfds.builder_from_directory` reads. TFDS's own writer would start again after an
interruption; this one writes:

    OUTPUT/NAME/.lock                one run at a time
    OUTPUT/NAME/1.0.0.incomplete/    while it runs: finished shards, each renamed when it is complete
    OUTPUT/NAME/1.0.0/               the data set, renamed when all shards and the metadata are written

The same command writes the missing shards after an interruption, and leaves a finished data set as it is. The files
and settings that it was packed from are kept beside the shards (`fingerprint`), and so are the names of files that
shards leave out because they cannot be read (left_out).
Examples are shuffled once (with a fixed seed), so that a shard, and a slice of a split, is a fair sample.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from poolformer_jax.fields import check_rules, is_local
from poolformer_jax.files import write_json
from poolformer_jax.images import ImageError, read_image
from poolformer_jax.messages import MAX_MESSAGE, printable
from train.data.config import ProblemType
from train.data.fingerprint import (
    Fingerprint,
    check_fingerprint,
    file_sizes,
    fingerprint_of,
    read_fingerprint,
    write_fingerprint,
)
from train.data.sources.archives import open_imagenet
from train.data.sources.class_map import relabel_by_map
from train.data.sources.folders import FolderSource, ListImages, describe_skipped, open_folder, read_class_folders
from train.data.sources.label_files import open_label_file
from train.data.sources.parquet import open_parquet
from train.data.sources.source import Example, Source, SourceError, check_not_empty, image_of
from train.folders import lock_folder

_VERSION = "1.0.0"
_ONE_CLASS: ProblemType = "single_label_classification"
_SOURCES = ("folder", "labels", "parquet", "imagenet")
_SHUFFLE_SEED = 0
_LEFT_OUT = "left_out"
# One record per group, so that random access reads nothing else; JPEGs do not compress further.
_WRITER_OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What to pack, and where."""

    source: str
    """"folder:PATH" (class folders), "labels:FILE" (CSV or JSONL), "parquet:PATH", or "imagenet:PATH" (the folder of
    the three archives of ILSVRC2012)."""
    output: Path
    """Folder for data sets; the result is in NAME/1.0.0 below it."""
    name: str | None = None
    """Name of the data set. Default: the folder's, or ilsvrc2012."""
    held_out: float = 0.1
    """Share of every class for validation if the source has no validation split."""
    image_column: str | None = None
    """Column of the images. Default: file_name in labels: sources, image in parquet: sources."""
    label_column: str = "label"
    """Column of the classes in labels: and parquet: sources."""
    class_map: Path | None = None
    """File with the class names in the order of their labels: one per line, or JSON {name: label}. Default: sorted."""
    images_per_shard: int = 1024
    """Images in a file. A thousand photographs of ImageNet make 120 MB."""
    threads: int = 8
    """Shards written at the same time."""
    on_bad_image: Literal["error", "skip"] = "error"
    """For files that cannot be read as images: list them and stop, or leave them out and list them."""

    def __post_init__(self) -> None:
        kind, _, path = self.source.partition(":")
        rules = [
            ("source", kind in _SOURCES and path, "folder:PATH, labels:FILE, parquet:PATH or imagenet:PATH"),
            ("output", is_local(self.output), "a local folder, or one of a mounted bucket"),
            ("name", re.fullmatch(r"[a-z]\w*", self.dataset_name), "a lower-case letter, then letters, digits and _"),
            ("held_out", 0 < self.held_out < 1, "a share between 0 and 1"),
            ("images_per_shard", self.images_per_shard > 0, "a positive number of images"),
            ("threads", self.threads > 0, "a positive number"),
        ]
        check_rules(self, rules)

    @property
    def path(self) -> Path:
        """The path in `source`."""
        return Path(self.source.partition(":")[2]).expanduser()

    @property
    def dataset_name(self) -> str:
        """The name in TFDS."""
        if self.name is not None:
            return self.name
        if self.source.startswith("imagenet:"):
            return "ilsvrc2012"  # TFDS already has an imagenet2012
        cleaned = re.sub(
            r"\W+", "_", (self.path.stem if self.path.is_file() else self.path.resolve().name).lower()
        ).strip("_")
        return cleaned if cleaned[:1].isalpha() else f"images_{cleaned}"

    @property
    def folder(self) -> Path:
        """Where the finished data set is."""
        return self.output.expanduser() / self.dataset_name / _VERSION


@dataclasses.dataclass(frozen=True)
class Progress:
    """Progress of listing or packing."""

    images: int
    """Found so far while the source is listed, packed so far afterwards."""
    total_images: int | None
    """None while the source is listed."""


class Prepared(NamedTuple):
    """The finished data set."""

    folder: Path
    """Read it as `tfds:FOLDER`."""
    images: dict[str, int]
    """Images in every split."""
    left_out: list[str]
    """Files that on_bad_image="skip" left out, in this run or earlier ones, each with the reason."""
    skipped: list[str]
    """What the class folders hold besides images, in words."""
    was_packed: bool
    """True if an earlier run had packed the same files: nothing was written."""


@dataclasses.dataclass(frozen=True)
class _Shard:
    split: str
    number: int
    of: int
    rows: np.ndarray

    def path(self, folder: Path, name: str) -> Path:
        return folder / f"{name}-{self.split}.array_record-{self.number:05d}-of-{self.of:05d}"

    def note(self, folder: Path) -> Path:
        """The file that lists what the shard leaves out, if anything; written before the shard."""
        return folder / _LEFT_OUT / f"{self.split}-{self.number:05d}-of-{self.of:05d}.json"


def prepare_data(config: PrepareConfig, on_progress: Callable[[Progress], None] = lambda progress: None) -> Prepared:
    """Packs a data set, or what an interrupted run left to do. A finished one of the same files stays as it is.

    Args:
        config: what to pack, and where.
        on_progress: called after every class that is listed and every shard that is written.

    Raises:
        SourceError: if there is nothing to pack, files cannot be read, or the folder holds shards of other files, or
            shards that leave out files although on_bad_image is "error".
        ValueError: if another run is packing the data set.
    """
    finished = (config.folder / "dataset_info.json").is_file()
    found = read_fingerprint(config.folder)
    if finished and found is None:  # checked before a long listing
        raise SourceError(
            f"{config.folder} holds a data set without a fingerprint of the files it was packed from: another program "
            f"made it. Train on it as it is with --data.source tfds:{config.folder}; or remove the folder to pack "
            "again, or choose another --output or --name."
        )
    sources = _open_sources(config, on_progress)
    fingerprint = fingerprint_of(sources, config.images_per_shard)
    if finished and found is not None:
        check_fingerprint(config.folder, config.source, fingerprint | file_sizes(sources, config.threads), found)
        return _result(config, sources, was_packed=True)
    refusal = (
        f"Another run is packing {config.folder}. Expected one at a time, because both would write the same shards. "
        "Wait until it ends; if it was stopped, the same command writes what is missing."
    )
    with lock_folder(config.folder.parent, refusal):
        _pack(config, sources, fingerprint, on_progress)
        return _result(config, sources, was_packed=False)


def _pack(
    config: PrepareConfig,
    sources: Mapping[str, Source],
    fingerprint: Fingerprint,
    on_progress: Callable[[Progress], None],
) -> None:
    """Writes the missing shards and the metadata, and gives the folder its final name."""
    work = config.folder.with_name(f"{_VERSION}.incomplete")
    work.mkdir(parents=True, exist_ok=True)
    if (found := read_fingerprint(work)) is None:
        write_fingerprint(work, fingerprint)
    else:
        check_fingerprint(work, config.source, fingerprint, found)
    shards = _shards(config, sources)
    _check_left_out(config, _left_out(config, shards, work), work)
    _write_missing(config, sources, shards, work, on_progress)
    _write_metadata(config, sources, shards, work)
    write_fingerprint(work, fingerprint | file_sizes(sources, config.threads))
    work.rename(config.folder)


def _result(config: PrepareConfig, sources: Mapping[str, Source], was_packed: bool) -> Prepared:
    import tensorflow_datasets as tfds

    left_out = _left_out(config, _shards(config, sources), config.folder)
    _check_left_out(config, left_out, config.folder)
    splits = tfds.builder_from_directory(config.folder).info.splits
    images = {name: split.num_examples for name, split in splits.items()}
    skipped = sorted({describe_skipped(source) for source in sources.values()} - {""})  # splits may share folders
    return Prepared(config.folder, images, left_out, skipped, was_packed)


def _open_sources(config: PrepareConfig, on_progress: Callable[[Progress], None]) -> Mapping[str, Source]:
    if config.source.startswith("imagenet:"):
        sources: Mapping[str, Source] = open_imagenet(config.path, lambda count: on_progress(Progress(count, None)))
    else:
        list_images = _list_once(on_progress)
        sources = {split: _open(config, split, list_images) for split in ("train", "validation")}
    for split, source in sources.items():
        check_not_empty(source, config.source, split)
    if config.class_map is None:
        return sources
    return {split: relabel_by_map(source, config.class_map, config.source) for split, source in sources.items()}


def _open(config: PrepareConfig, split: str, list_images: ListImages) -> Source:
    columns = (config.image_column, config.label_column, _ONE_CLASS)
    if config.source.startswith("labels:"):
        return open_label_file(str(config.path), split, config.held_out, *columns)
    if config.source.startswith("parquet:"):
        return open_parquet(str(config.path), split, config.held_out, *columns)
    return open_folder(config.path, split, config.held_out, list_images)


def _list_once(on_progress: Callable[[Progress], None]) -> ListImages:
    """Lists class folders and reports the images found so far; a folder that two splits share is listed once."""
    listed = 0

    @functools.cache
    def list_images(root: Path, class_names: tuple[str, ...] | None) -> FolderSource:
        nonlocal listed
        source = read_class_folders(root, class_names, lambda count: on_progress(Progress(listed + count, None)))
        listed += len(source)
        return source

    return list_images


def _left_out(config: PrepareConfig, shards: list[_Shard], folder: Path) -> list[str]:
    """Files that the finished shards in a folder leave out because they cannot be read, each with the reason."""
    lists = [shard.note(folder) for shard in shards if shard.path(folder, config.dataset_name).exists()]
    return sorted(name for path in lists if path.exists() for name in json.loads(path.read_text(encoding="utf-8")))


def _check_left_out(config: PrepareConfig, left_out: list[str], folder: Path) -> None:
    """Raises SourceError if shards in `folder` leave out files and on_bad_image is "error"."""
    if left_out and config.on_bad_image == "error":
        listed = "\n  ".join(left_out)
        raise SourceError(
            f"{folder} was packed with --on-bad-image skip and leaves out {len(left_out)} files that could not be read:"
            f"\n  {listed}\nExpected no such files, because of --on-bad-image error. Accept it with --on-bad-image "
            "skip; or replace them and remove that folder to pack again."
        )


def _shards(config: PrepareConfig, sources: Mapping[str, Source]) -> list[_Shard]:
    return [shard for split, source in sources.items() for shard in _split_shards(split, len(source), config)]


def _split_shards(split: str, examples: int, config: PrepareConfig) -> Iterator[_Shard]:
    order = np.random.default_rng(_SHUFFLE_SEED).permutation(examples)
    count = -(-examples // config.images_per_shard)
    for number, rows in enumerate(np.array_split(order, count)):
        yield _Shard(split, number, count, rows)


def _write_missing(
    config: PrepareConfig,
    sources: Mapping[str, Source],
    shards: list[_Shard],
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


def _write_shard(config: PrepareConfig, source: Source, features: Any, shard: _Shard, work: Path) -> list[str]:
    """Writes one shard, complete or not at all. Returns the files that cannot be read, each with the reason."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    path = shard.path(work, config.dataset_name)
    temporary = path.with_name(f".{path.name}.tmp")
    writer = ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
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
    if bad and config.on_bad_image == "error":
        temporary.unlink()
        return bad
    if (written := ArrayRecordReader(str(temporary)).num_records()) != len(shard.rows) - len(bad):
        temporary.unlink()
        raise OSError(
            f"{path} holds {written} of {len(shard.rows) - len(bad)} images. Check that the disk is not full."
        )
    if bad:
        write_json(shard.note(work), bad)
    else:
        shard.note(work).unlink(missing_ok=True)  # left by an interrupted run
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.rename(path)
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


def _write_metadata(config: PrepareConfig, sources: Mapping[str, Source], shards: list[_Shard], work: Path) -> None:
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
        version=_VERSION,
        filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        check_data=False,  # its check needs TensorFlow
        description=f"Packed from {config.source.partition(':')[0]} by poolformer-jax.",
    )

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

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from poolformer_jax.files import sync
from poolformer_jax.network import ProblemType
from train.data.fingerprint import (
    Fingerprint,
    check_fingerprint,
    file_sizes,
    fingerprint_of,
    read_fingerprint,
    write_fingerprint,
)
from train.data.prepare_config import VERSION, PrepareConfig
from train.data.shards import Progress, files_left_out, shards_of, write_metadata, write_missing
from train.data.sources.archives import open_imagenet
from train.data.sources.class_map import relabel_by_map
from train.data.sources.folders import FolderSource, ListImages, describe_skipped, open_folder, read_class_folders
from train.data.sources.label_files import open_label_file
from train.data.sources.parquet import open_parquet
from train.data.sources.source import Source, SourceError, check_not_empty
from train.folders import lock_folder

_ONE_CLASS: ProblemType = "single_label_classification"


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
    work = config.folder.with_name(f"{VERSION}.incomplete")
    work.mkdir(parents=True, exist_ok=True)
    if (found := read_fingerprint(work)) is None:
        write_fingerprint(work, fingerprint)
    else:
        check_fingerprint(work, config.source, fingerprint, found)
    shards = shards_of(config, sources)
    _check_left_out(config, files_left_out(config, shards, work), work)
    write_missing(config, sources, shards, work, on_progress)
    write_metadata(config, sources, shards, work)
    write_fingerprint(work, fingerprint | file_sizes(sources, config.threads))
    for path in (*work.rglob("*"), work):  # TFDS does not sync its metadata
        sync(path)
    work.rename(config.folder)
    sync(config.folder.parent)


def _result(config: PrepareConfig, sources: Mapping[str, Source], was_packed: bool) -> Prepared:
    import tensorflow_datasets as tfds

    left_out = files_left_out(config, shards_of(config, sources), config.folder)
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


def _check_left_out(config: PrepareConfig, left_out: list[str], folder: Path) -> None:
    """Raises SourceError if shards in `folder` leave out files and on_bad_image is "error"."""
    if left_out and config.on_bad_image == "error":
        listed = "\n  ".join(left_out)
        raise SourceError(
            f"{folder} was packed with --on-bad-image skip and leaves out {len(left_out)} files that could not be read:"
            f"\n  {listed}\nExpected no such files, because of --on-bad-image error. Accept it with --on-bad-image "
            "skip; or replace them and remove that folder to pack again."
        )

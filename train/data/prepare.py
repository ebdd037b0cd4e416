"""`python -m train prepare`: class folders or ImageNet's archives into TFDS's ArrayRecord shards.

Why: a pod's storage reads a thousand large files well and a million small ones badly. Images keep their bytes. The
result is an ordinary TFDS data set, which `tfds.builder_from_directory` reads, made by our own writer because TFDS's
starts from nothing after an interruption:

    OUTPUT/NAME/.lock                one run at a time
    OUTPUT/NAME/1.0.0.incomplete/    while it runs: finished shards, each renamed when it is whole
    OUTPUT/NAME/1.0.0/               the data set, renamed when all shards and the metadata are there

Running the same command again goes on with the shards that are missing, and leaves a finished data set as it is. Which
files and settings it was made of stays noted beside it (`origin`), so that others are never taken for them; so does
what shards leave out because it is no image, in a folder left_out.
Examples are shuffled once (with a fixed seed), so that a shard, and a slice of a split, is a fair sample.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from poolformer_jax.fields import check_rules, is_local
from poolformer_jax.files import write_json
from poolformer_jax.images.reading import printable
from train.data.sources.archives import open_imagenet
from train.data.sources.folders import FolderSource, open_folder, read_class_folders
from train.data.sources.origin import Origin, require_note
from train.data.sources.source import Example, Source, SourceError, image_of, require_images
from train.folders import lock_folder

_VERSION = "1.0.0"
_SHUFFLE_SEED = 0
_LEFT_OUT = "left_out"
# Every record by itself: random access reads nothing else. JPEG does not get smaller by compressing it again.
_WRITER_OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What to pack, and where to."""

    source: str
    """"folder:PATH" (class folders) or "imagenet:PATH" (a folder with the three archives of ILSVRC2012)."""
    output: Path
    """Folder for data sets; NAME/1.0.0 is made in it."""
    name: str | None = None
    """Name of the data set. Default: the folder's, or ilsvrc2012."""
    held_out: float = 0.1
    """Share of every class for validation, where class folders have no split of their own."""
    images_per_shard: int = 1024
    """Images in a file. A thousand photographs of ImageNet make 120 MB."""
    threads: int = 8
    """Shards written at the same time."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What to do about a file that is no image: name all of them and stop, or leave them out and list them."""

    def __post_init__(self) -> None:
        kind, _, path = self.source.partition(":")
        rules = [
            ("source", kind in ("folder", "imagenet") and path, "folder:PATH or imagenet:PATH"),
            ("output", is_local(self.output), "a folder of this machine, or of a bucket that is mounted"),
            ("name", re.fullmatch(r"[a-z]\w*", self.dataset_name), "a lower-case letter, then letters, digits and _"),
            ("held_out", 0 < self.held_out < 1, "a share between 0 and 1"),
            ("images_per_shard", self.images_per_shard > 0, "a positive number of images"),
            ("threads", self.threads > 0, "a positive number"),
        ]
        check_rules(self, rules)

    @property
    def path(self) -> Path:
        """What `source` points to."""
        return Path(self.source.partition(":")[2]).expanduser()

    @property
    def dataset_name(self) -> str:
        """As TFDS knows it."""
        if self.name is not None:
            return self.name
        if self.source.startswith("imagenet:"):
            return "ilsvrc2012"  # TFDS has an imagenet2012 of its own
        cleaned = re.sub(r"\W+", "_", self.path.resolve().name.lower()).strip("_")
        return cleaned if cleaned[:1].isalpha() else f"images_{cleaned}"

    @property
    def folder(self) -> Path:
        """Where the finished data set is."""
        return self.output.expanduser() / self.dataset_name / _VERSION


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far it is, for whoever shows it."""

    images: int
    """Found so far while the source is listed, packed so far afterwards."""
    total_images: int | None
    """None while the source is listed."""


class Prepared(NamedTuple):
    """What became of it."""

    folder: Path
    """Holds the finished data set: read it as `tfds:FOLDER`."""
    images: dict[str, int]
    """Images in every split."""
    left_out: list[str]
    """Files that are no images, and why: what on_bad_image="skip" left out, also in runs before this one."""


@dataclasses.dataclass(frozen=True)
class _Shard:
    split: str
    number: int
    of: int
    rows: np.ndarray

    def path(self, folder: Path, name: str) -> Path:
        return folder / f"{name}-{self.split}.array_record-{self.number:05d}-of-{self.of:05d}"

    def note(self, folder: Path) -> Path:
        """The file that names what the shard leaves out; it is there if there is anything, and before the shard."""
        return folder / _LEFT_OUT / f"{self.split}-{self.number:05d}-of-{self.of:05d}.json"


def prepare(config: PrepareConfig, on_progress: Callable[[Progress], None] = lambda progress: None) -> Prepared:
    """Packs the data set, or what an interrupted run left to do. One that is finished of these files stays as it is.

    Args:
        config: what and where.
        on_progress: called with every class listed and every shard written.

    Raises:
        SourceError: if there is nothing to pack, files are no images, or the folder holds another data set, or shards
            that leave files out without being told to.
        ValueError: if another run is packing the data set.
    """
    if _is_finished(config):
        require_note(config.folder)  # before a long listing
    sources = _open_sources(config, on_progress)
    origin = _origin(config, sources)
    if _is_finished(config):
        origin.compare(config.folder)
        return _outcome(config, sources)
    refusal = (
        f"Another run is packing {config.folder}. Expected one at a time: they would write the same shards. Wait for "
        "its end; if it is stopped, the same command goes on with what is left to do."
    )
    with lock_folder(config.folder.parent, refusal):
        _pack(config, sources, origin, on_progress)
        return _outcome(config, sources)


def _is_finished(config: PrepareConfig) -> bool:
    return (config.folder / "dataset_info.json").is_file()


def _pack(
    config: PrepareConfig,
    sources: Mapping[str, Source],
    origin: Origin,
    on_progress: Callable[[Progress], None],
) -> None:
    """Packs what is not packed yet and finishes the data set."""
    work = config.folder.with_name(f"{_VERSION}.incomplete")
    work.mkdir(parents=True, exist_ok=True)
    origin.claim(work)
    shards = _shards(config, sources)
    _require_consent(config, _left_out(config, shards, work), work)
    bad = _write_missing(config, sources, shards, work, on_progress)
    if bad and config.on_bad_image == "error":
        raise SourceError(
            f"{len(bad)} files are no images:\n  " + "\n  ".join(bad) + "\nReplace or remove them and run the command "
            "again (what is packed stays packed), or leave them out with --on-bad-image skip."
        )
    _write_metadata(config, sources, shards, work)
    origin.note(work)
    work.rename(config.folder)


def _outcome(config: PrepareConfig, sources: Mapping[str, Source]) -> Prepared:
    import tensorflow_datasets as tfds

    left_out = _left_out(config, _shards(config, sources), config.folder)
    _require_consent(config, left_out, config.folder)
    splits = tfds.builder_from_directory(config.folder).info.splits
    return Prepared(config.folder, {name: split.num_examples for name, split in splits.items()}, left_out)


def _open_sources(config: PrepareConfig, on_progress: Callable[[Progress], None]) -> Mapping[str, Source]:
    if config.source.startswith("imagenet:"):
        sources: Mapping[str, Source] = open_imagenet(config.path, lambda count: on_progress(Progress(count, None)))
    else:
        listing = _Listing(on_progress)
        splits = ("train", "validation")
        sources = {split: open_folder(config.path, split, config.held_out, listing) for split in splits}
    for split, source in sources.items():  # training takes no empty split either
        require_images(source, config.source, split)
    return sources


class _Listing:
    """Lists class folders and says how many images it has found; a folder that two splits share, only once."""

    def __init__(self, on_progress: Callable[[Progress], None]) -> None:
        self._on_progress, self._found = on_progress, 0
        self._list = functools.cache(self._list_and_tell)

    def __call__(self, root: Path, class_names: tuple[str, ...] | None) -> FolderSource:
        return self._list(root, class_names)

    def _list_and_tell(self, root: Path, class_names: tuple[str, ...] | None) -> FolderSource:
        before = self._found
        source = read_class_folders(root, class_names, lambda count: self._on_progress(Progress(before + count, None)))
        self._found += len(source)
        return source


def _origin(config: PrepareConfig, sources: Mapping[str, Source]) -> Origin:
    return Origin(config.source, sources, {"images_per_shard": config.images_per_shard}, config.threads)


def _left_out(config: PrepareConfig, shards: list[_Shard], folder: Path) -> list[str]:
    """The names of files that the finished shards in a folder leave out because they are no images, and why."""
    names = []
    for shard in shards:
        if shard.path(folder, config.dataset_name).exists() and shard.note(folder).exists():
            names += json.loads(shard.note(folder).read_text(encoding="utf-8"))
    return sorted(names)


def _require_consent(config: PrepareConfig, left_out: list[str], folder: Path) -> None:
    """Refuses to go on with shards, or to take a data set for finished, that leave out what they should not.

    Raises:
        SourceError: with the names.
    """
    if left_out and config.on_bad_image == "error":
        listed = "\n  ".join(left_out)
        raise SourceError(
            f"{folder} was packed with --on-bad-image skip, and leaves out {len(left_out)} files that were no images:"
            f"\n  {listed}\nExpected none to be left out, as --on-bad-image error wants it. Leave them out with "
            "--on-bad-image skip; or replace them and remove that folder, to pack again."
        )


def _shards(config: PrepareConfig, sources: Mapping[str, Source]) -> list[_Shard]:
    return [shard for split, source in sources.items() for shard in _plan(split, len(source), config)]


def _plan(split: str, examples: int, config: PrepareConfig) -> list[_Shard]:
    order = np.random.default_rng(_SHUFFLE_SEED).permutation(examples)
    count = -(-examples // config.images_per_shard)
    return [_Shard(split, number, count, rows) for number, rows in enumerate(np.array_split(order, count))]


def _write_missing(
    config: PrepareConfig,
    sources: Mapping[str, Source],
    shards: list[_Shard],
    work: Path,
    on_progress: Callable[[Progress], None],
) -> list[str]:
    """Writes the shards that are not there yet; returns the names of files that are no images."""
    total = sum(len(shard.rows) for shard in shards)
    missing = [shard for shard in shards if not shard.path(work, config.dataset_name).exists()]
    images = total - sum(len(shard.rows) for shard in missing)
    on_progress(Progress(images, total))
    bad: list[str] = []
    # Made before there are threads: TFDS loads its parts when they are first used, which only one thread may do.
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
    return sorted(bad)


def _write_shard(config: PrepareConfig, source: Source, features: Any, shard: _Shard, work: Path) -> list[str]:
    """One file, whole or not at all. Returns the names of files that are no images."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    path = shard.path(work, config.dataset_name)
    temporary = path.with_name(f".{path.name}.tmp")
    writer = ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
    bad = []
    try:
        for row in shard.rows:
            example = source[int(row)]
            if (reason := _why_no_image(example)) is not None:
                bad.append(f"{example['id']}: {reason}")
                continue
            name = printable(source.names[row].item()) if isinstance(source, FolderSource) else example["id"]
            record = {"image": example["image"], "label": example["label"], "file_name": name}
            writer.write(features.serialize_example(features.encode_example(record)))
    finally:
        writer.close()
    if bad and config.on_bad_image == "error":
        temporary.unlink()
        return bad
    if (written := ArrayRecordReader(str(temporary)).num_records()) != len(shard.rows) - len(bad):
        temporary.unlink()
        raise OSError(f"{path} holds {written} of {len(shard.rows) - len(bad)} images. Is the disk full?")
    if bad:
        write_json(shard.note(work), bad)
    else:
        shard.note(work).unlink(missing_ok=True)  # of a run that was interrupted before it finished this shard
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.rename(path)
    return bad


def _why_no_image(example: Example) -> str | None:
    """Looks at the header only; what is damaged further on shows when it is decoded."""
    try:
        with Image.open(BytesIO(image_of(example))) as image:
            return None if min(image.size) > 0 else "no pixels"
    except UnidentifiedImageError:  # whose message shows an object's address
        return "of no format that Pillow knows"
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, struct.error, ... for foreign bytes
        return str(error) or type(error).__name__


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

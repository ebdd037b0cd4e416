"""Images for training and evaluation, from a data set on disk to pixels on the device.

What the training loop uses, in the order of a run (`...` stands for optional arguments):

    config.image_processor()                  -> the PoolFormerImageProcessor for evaluation, saved with the model
    source = open_source(config, config.train_split)     # or config.evaluation_split
    len(source), source.class_names, source[i] -> {"image", "label", "id"}

    with train_batches(config, source, start_step=0, process_index=0, process_count=1) as batches:
        next(batches) -> {"image": uint8 [b, H, W, C], "label": int32 [b], "index": int64 [b]}
        batches.bad_images                    -> {id: reason} for images that on_bad_image="skip" replaced so far
    with evaluation_batches(config, source, process_index=0, process_count=1) as batches:
        next(batches) -> the same and "mask": bool [b], False for rows that only fill up the batch

    pixels, targets = augment_batch(key, image, label, config, num_classes=n, dtype=jnp.bfloat16)
    pixels = normalize_batch(image, config, dtype)

    prepare_data(PrepareConfig(source="folder:PATH", output=FOLDER), on_progress) -> Prepared

b is config.batch_size / process_count: this process's consecutive part of the global batch. The batch at step s is a
pure function of (config.seed, s), for any number of processes, workers and restarts: example j has the global position
g = s * batch_size + j, which is place g % N of the permutation of epoch g // N, and its random transforms are keyed by
(seed, g). `train_batches` never ends and starts at any step at once, so a checkpoint keeps the step and nothing else.
`evaluation_batches` reads the split once, in order, with the same number of batches on every process.

Workers use NumPy and Pillow and never import jax; only `augment.device` does. Names are imported when first used.
Errors that a user can fix are PoolFormerErrors.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.data.augment.device import augment_batch as augment_batch
    from train.data.augment.device import normalize_batch as normalize_batch
    from train.data.augment.jpeg_region import decodes_regions as decodes_regions
    from train.data.augment.resizing import choose_resizer as choose_resizer
    from train.data.augment.transforms import TrainingTransform as TrainingTransform
    from train.data.config import DIGITS as DIGITS
    from train.data.config import DataConfig as DataConfig
    from train.data.config import DeviceAugmentation as DeviceAugmentation
    from train.data.config import HostAugmentation as HostAugmentation
    from train.data.labels import check_same_classes as check_same_classes
    from train.data.labels import match_labels as match_labels
    from train.data.pipeline import Batches as Batches
    from train.data.pipeline import batch_bytes as batch_bytes
    from train.data.pipeline import evaluation_batches as evaluation_batches
    from train.data.pipeline import evaluation_steps as evaluation_steps
    from train.data.pipeline import max_shared_batches as max_shared_batches
    from train.data.pipeline import train_batches as train_batches
    from train.data.pipeline import worker_count as worker_count
    from train.data.prepare import PrepareConfig as PrepareConfig
    from train.data.prepare import prepare_data as prepare_data
    from train.data.sources.folders import ALL_IMAGES as ALL_IMAGES
    from train.data.sources.folders import FolderSource as FolderSource
    from train.data.sources.folders import describe_skipped as describe_skipped
    from train.data.sources.folders import describe_split as describe_split
    from train.data.sources.folders import is_pool as is_pool
    from train.data.sources.opening import open_source as open_source
    from train.data.sources.source import ArraySource as ArraySource
    from train.data.sources.source import Example as Example
    from train.data.sources.source import Source as Source
    from train.data.sources.source import SourceError as SourceError
    from train.data.sources.source import image_of as image_of
    from train.data.workers.failures import SHARED_MEMORY_ADVICE as SHARED_MEMORY_ADVICE
    from train.data.workers.failures import WorkerError as WorkerError

# The file that each public name comes from.
_FILES = {
    "augment.device": ("augment_batch", "normalize_batch"),
    "augment.jpeg_region": ("decodes_regions",),
    "augment.resizing": ("choose_resizer",),
    "augment.transforms": ("TrainingTransform",),
    "config": ("DIGITS", "DataConfig", "DeviceAugmentation", "HostAugmentation"),
    "labels": ("check_same_classes", "match_labels"),
    "pipeline": (
        "Batches",
        "batch_bytes",
        "evaluation_batches",
        "evaluation_steps",
        "max_shared_batches",
        "train_batches",
        "worker_count",
    ),
    "prepare": ("PrepareConfig", "prepare_data"),
    "sources.folders": ("ALL_IMAGES", "FolderSource", "describe_skipped", "describe_split", "is_pool"),
    "sources.opening": ("open_source",),
    "sources.source": ("ArraySource", "Example", "Source", "SourceError", "image_of"),
    "workers.failures": ("SHARED_MEMORY_ADVICE", "WorkerError"),
}


def __getattr__(name: str) -> Any:
    for file, names in _FILES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{file}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

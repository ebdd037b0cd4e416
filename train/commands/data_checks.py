"""The doctor's checks of the data: counts, classes, a sample of the images, and the speed of the storage."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from poolformer_jax.images import ImageError, read_image
from poolformer_jax.messages import first_few
from train.commands.finding import Finding
from train.config import TrainConfig
from train.data import (
    ArraySource,
    FolderSource,
    Source,
    TrainingTransform,
    describe_skipped,
    describe_unused_test,
    image_of,
)

# Images of each split that are read; the chance to miss 1 % bad ones is 0.99**256, about 8 %.
_SAMPLE = 256
_READERS = 16
# With fewer random reads a second, sixteen at a time, storage cannot feed even one accelerator.
_FEW_READS = 500.0


def check_split(config: TrainConfig, split: str, source: Source) -> Iterator[Finding]:
    """Counts, the speed of random reads, and whether a sample of the images can be read."""
    subject, number = f"data, {split}", len(source.class_names)
    classes = f"{number:,} {'class' if number == 1 else 'classes'} ({first_few(source.class_names)})"
    notes = [describe_skipped(source)]
    if split == config.data.evaluation_split:
        notes.append(describe_unused_test(config.data))
    yield Finding("fine", subject, "; ".join([f"{len(source):,} images of {classes}", *filter(None, notes)]))
    if split == config.data.train_split and len(source) < config.data.batch_size:
        yield Finding(
            "warning",
            subject,
            f"a batch of {config.data.batch_size} repeats images, because there are only {len(source)}",
            "Choose a smaller --data.batch-size.",
        )
    rows = np.random.default_rng(0).choice(len(source), min(_SAMPLE, len(source)), replace=False)
    start = time.perf_counter()
    with ThreadPoolExecutor(_READERS) as threads:
        examples = list(threads.map(lambda row: source[int(row)], rows))
    reads = len(rows) / (time.perf_counter() - start)
    if not isinstance(source, ArraySource):
        yield Finding(
            "fine" if reads >= _FEW_READS else "warning",
            f"storage, {split}",
            f"{reads:,.0f} random reads a second, {_READERS} at a time",
            "Pack the images for fast random access with python -m train prepare, or bring them closer.",
        )
    yield _check_images(config, subject, examples)


def check_classes(config: TrainConfig, sources: Sequence[Source]) -> Iterator[Finding]:
    """Whether the splits have the same classes, at least two, each with held-out images."""
    first = sources[0]
    if config.data.problem_type == "regression":
        return
    if len(first.class_names) < 2 and not config.data.has_target_vectors:
        yield Finding(
            "failure",
            "classes",
            f"there is only one, {', '.join(first.class_names)}, so every answer would be right",
            "Name the folder that holds one folder per class.",
        )
        return
    for other in sources[1:]:
        if other.class_names != first.class_names:
            missing = sorted(set(first.class_names) ^ set(other.class_names)) or ["their order"]
            yield Finding(
                "failure", "classes", f"the splits differ in {', '.join(missing[:10])}", "Give both the same classes."
            )
        if isinstance(other, ArraySource | FolderSource):  # other sources would have to read every image
            yield from _check_held_out_classes(other)


def _check_held_out_classes(held_out: ArraySource | FolderSource) -> Iterator[Finding]:
    labels = held_out.labels
    seen = set((labels if labels.ndim == 1 else np.flatnonzero(labels.any(0))).tolist())
    if missing := [name for label, name in enumerate(held_out.class_names) if label not in seen]:
        yield Finding(
            "warning",
            "classes",
            f"{len(missing):,} have no held-out image, so their accuracy stays unknown: {first_few(missing)}",
            "Add images; a class with a single image has none held out.",
        )


def _check_images(config: TrainConfig, subject: str, examples: Sequence[Any]) -> Finding:
    transform, rng, bad = TrainingTransform(config.data), np.random.default_rng(0), []
    seconds = 0.0
    for example in examples:
        try:
            image = image_of(example)
            read_image(image, config.data.num_channels)  # the whole image; a crop may need only a part
            start = time.perf_counter()
            transform(image, rng)
            seconds += time.perf_counter() - start
        except ImageError as error:
            bad.append(f"{example['id']}: {error}")
    milliseconds = 1e3 * seconds / len(examples)
    if bad:
        listed = "\n".join(bad[:10])
        return Finding(
            "failure" if config.data.on_bad_image == "error" or len(bad) == len(examples) else "warning",
            subject,
            f"{len(bad)} of {len(examples)} sampled images cannot be read:\n{listed}",
            "Replace them, or train without them: --data.on-bad-image skip.",
        )
    found = f"{len(examples)} sampled images are all readable; {milliseconds:.1f} ms each to decode and transform"
    return Finding("fine", subject, found)

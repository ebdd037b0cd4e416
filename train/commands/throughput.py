"""`python -m train throughput`: images per second of the input pipeline alone, whose batches are discarded."""

import dataclasses
import time

import tyro

from poolformer_jax.resources import available_cores
from train.data import Batches, DataConfig, choose_resizer, decodes_regions, open_source, train_batches, worker_count


@dataclasses.dataclass(frozen=True)
class ThroughputConfig:
    """What to measure, and how long."""

    data: tyro.conf.OmitArgPrefixes[DataConfig]
    """The pipeline."""
    rounds: int = 5
    """Number of measurements."""
    batches: int = 8
    """Batches per measurement. Before the first one, all prefetched batches are consumed."""


def run_throughput(measurement: ThroughputConfig) -> None:
    """Measures and prints the rate of every round."""
    config = measurement.data
    source = open_source(config, config.train_split)
    workers = worker_count(config, source)
    with train_batches(config, source) as batches:
        consume(batches, max(1, workers) * (config.worker_batches + 1))
        decoder = "nvImageCodec" if decodes_regions() else "Pillow"
        resizer = {"simd": "cykooz-resizer", "pillow": "Pillow"}[choose_resizer(config.augment.resizer)]
        print(f"{len(source)} images, {workers} worker processes on {available_cores()} cores")
        print(f"{decoder} decodes JPEGs, {resizer} resizes")
        for _ in range(measurement.rounds):
            start = time.perf_counter()
            consume(batches, measurement.batches)
            seconds = time.perf_counter() - start
            images = measurement.batches * config.batch_size
            print(
                f"{images / seconds:8.0f} images/s   {1e3 * seconds / measurement.batches:8.1f} ms a batch", flush=True
            )


def consume(batches: Batches, count: int) -> None:
    """Reads `count` batches and copies their pixels, as a transfer to a device would."""
    for _ in range(count):
        next(batches)["image"].copy()

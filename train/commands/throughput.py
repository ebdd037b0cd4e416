"""Images per second of the input pipeline: `python -m train.commands.throughput --source folder:PATH`.

Every field of DataConfig is a flag. Runs only the pipeline and discards its batches. If training consumes more images
per second, the accelerator waits: add workers, or pack the data set (`python -m train prepare`).
"""

import dataclasses
import sys
import time
from collections.abc import Sequence

from poolformer_jax.process import available_cores, error_message, print_error
from train.data import Batches, DataConfig, choose_resizer, decodes_regions, open_source, train_batches, worker_count


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What to measure, and how long."""

    data: DataConfig
    """The pipeline."""
    rounds: int = 5
    """Number of measurements."""
    batches: int = 8
    """Batches per measurement. Before the first one, all prefetched batches are consumed."""


def main(arguments: Sequence[str]) -> int:
    """Measures, prints, and returns the exit code."""
    import tyro

    measurement = tyro.cli(
        Measurement,
        prog="python -m train.commands.throughput",
        args=list(arguments),
        config=(tyro.conf.OmitArgPrefixes,),
    )
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
    return 0


def consume(batches: Batches, count: int) -> None:
    """Reads `count` batches and copies their pixels, as a transfer to a device would."""
    for _ in range(count):
        next(batches)["image"].copy()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Exception as error:
        if (message := error_message(error)) is None:
            raise
        print_error(message)
        sys.exit(1)

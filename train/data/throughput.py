"""How many images a second the input pipeline makes: `python -m train.data.throughput --source folder:PATH`.

Every field of DataConfig is a flag. Nothing but the pipeline runs: what it makes is thrown away. If this number is
below what training consumes, the accelerator waits. Add workers, or pack the data set (`python -m train prepare`).
"""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence

from poolformer_jax.cores import available_cores
from train.data.config import DataConfig
from train.data.jpeg_region import decodes_regions
from train.data.pipeline import Batches, default_workers, train_batches
from train.data.resizing import choose_resizer
from train.data.sources import open_source


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What to measure, and how often."""

    data: DataConfig
    """The pipeline."""
    rounds: int = 5
    """How many times to measure."""
    batches: int = 8
    """Batches in a round. As many as all workers keep ready are made before the first."""
    on_request: bool = False
    """Instead, consume as many batches as each line of the standard input says, and answer "done"."""


def main(arguments: Sequence[str]) -> int:
    """Measures, prints, and returns the exit code."""
    import tyro

    measurement = tyro.cli(
        Measurement, prog="python -m train.data.throughput", args=list(arguments), config=(tyro.conf.OmitArgPrefixes,)
    )
    config = measurement.data
    source = open_source(config, config.train_split)
    workers = default_workers(source) if config.workers is None else config.workers
    with train_batches(config, source) as batches:
        if measurement.on_request:
            _answer_requests(batches)
            return 0
        _consume(batches, max(1, workers) * (config.worker_batches + 1))
        decoder = "nvImageCodec" if decodes_regions() else "Pillow"
        resizer = {"simd": "cykooz-resizer", "pillow": "Pillow"}[choose_resizer(config.augment.resizer)]
        print(f"{len(source)} images, {workers} worker processes on {available_cores()} cores")
        print(f"{decoder} decodes JPEGs, {resizer} resizes")
        for _ in range(measurement.rounds):
            start = time.perf_counter()
            _consume(batches, measurement.batches)
            seconds = time.perf_counter() - start
            images = measurement.batches * config.batch_size
            print(
                f"{images / seconds:8.0f} images/s   {1e3 * seconds / measurement.batches:8.1f} ms a batch", flush=True
            )
    return 0


def _answer_requests(batches: Batches) -> None:
    _consume(batches, 1)
    packages = ("grain", "pillow", "cykooz-resizer", "nvidia-nvimgcodec-cu12")
    print(json.dumps({package: _version(package) for package in packages}), flush=True)
    for line in sys.stdin:
        _consume(batches, int(line))
        print("done", flush=True)


def _consume(batches: Batches, count: int) -> None:
    for _ in range(count):
        next(batches)["image"].copy()  # read every pixel, as the way to a device does


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)

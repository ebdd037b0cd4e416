"""The training program's own input pipeline; every field of its DataConfig is a flag. Run by input_pipeline.py.

Answers every line N on the standard input with "done" after N batches.
"""

import json
import sys
from importlib.metadata import distributions

import tyro

from train.commands.throughput import consume
from train.data.config import DataConfig
from train.data.pipeline import train_batches
from train.data.sources.opening import open_source

PACKAGES = ("grain", "pillow", "cykooz-resizer", "nvidia-nvimgcodec-cu12")


def main() -> None:
    """Serves batches on request."""
    config = tyro.cli(DataConfig, config=(tyro.conf.OmitArgPrefixes,))
    with train_batches(config, open_source(config, config.train_split)) as batches:
        consume(batches, 1)
        print(json.dumps({one.name: one.version for one in distributions() if one.name in PACKAGES}), flush=True)
        for line in sys.stdin:
            consume(batches, int(line))
            print("done", flush=True)


if __name__ == "__main__":
    main()

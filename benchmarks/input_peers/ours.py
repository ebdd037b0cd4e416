"""The input pipeline of `python -m train`; every field of DataConfig is a flag. Started by input_pipeline.py.

Reads a number N per line from stdin, makes N batches, and answers "done".
"""

import json
import sys
from importlib.metadata import distributions

import tyro

from train.commands import consume
from train.data import DataConfig, open_source, train_batches

PACKAGES = ("grain", "pillow", "cykooz-resizer", "nvidia-nvimgcodec-cu12")


def main() -> None:
    """Makes batches until stdin ends."""
    config = tyro.cli(DataConfig, config=(tyro.conf.OmitArgPrefixes,))
    with train_batches(config, open_source(config, config.train_split)) as batches:
        consume(batches, 1)
        print(json.dumps({one.name: one.version for one in distributions() if one.name in PACKAGES}), flush=True)
        for line in sys.stdin:
            consume(batches, int(line))
            print("done", flush=True)


if __name__ == "__main__":
    main()

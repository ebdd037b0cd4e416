"""`predict`: the most probable labels of images."""

import argparse
import csv
import json
import os
import sys

from poolformer_jax.cli.arguments import (
    add_batches,
    add_images,
    add_runtime,
    add_weights,
    batch_options,
    image_files,
    positive,
    source_options,
    starting_jax,
    waiting,
)
from poolformer_jax.messages import MAX_MESSAGE, csv_cell, printable, printable_message
from poolformer_jax.process import print_error

NAME = "predict"
HELP = "Print the most probable labels of images."
EXAMPLE = """  python -m poolformer_jax predict cat.jpg dog.png --weights runs/digits/model
  python -m poolformer_jax predict photographs/ --recursive --csv > labels.csv
  find photographs -name "*.jpg" | python -m poolformer_jax predict -

Exit code 0 if every image was classified, 1 if one could not be read; the
others are printed anyway."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_images(parser)
    add_weights(parser)
    parser.add_argument(
        "--top-k", type=positive, default=5, metavar="K", help="labels per image (default: %(default)s)"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object per image and line")
    form.add_argument("--csv", action="store_true", help="print a CSV table with one row per image and label")
    add_batches(parser)
    add_runtime(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints predictions as they are ready; returns the exit code."""
    paths = image_files(arguments)
    with starting_jax():
        from poolformer_jax.images import ImageError
        from poolformer_jax.inference import ImageClassifier
    with waiting(f"Loading {arguments.weights}"):
        classifier = ImageClassifier.from_pretrained(
            arguments.weights,
            runtime=arguments.runtime,
            **batch_options(arguments, len(paths)),
            **source_options(arguments),
        )
    results = classifier.stream(paths, arguments.top_k)
    failed = 0
    table = csv.writer(sys.stdout, lineterminator="\n")
    if arguments.csv:
        table.writerow(["image", "rank", "label", "probability"])
    for number, path in enumerate(paths, start=1):
        with waiting(f"Classifying image {number} of {len(paths)}"):
            result = next(results)
        if isinstance(result, ImageError):
            failed += 1
            print_error(printable_message(f"{os.fspath(path)}: {result}"))
            if arguments.json:
                print(json.dumps({"image": str(path), "error": str(result)}))
        elif arguments.json:
            print(json.dumps({"image": str(path), "predictions": [prediction._asdict() for prediction in result]}))
        elif arguments.csv:
            for rank, (label, probability) in enumerate(result, start=1):
                table.writerow([csv_cell(path), rank, csv_cell(label), probability])
        else:
            print(printable(path, MAX_MESSAGE))
            for label, probability in result:
                print(f"  {100 * probability:5.1f} %  {printable(label, MAX_MESSAGE)}")
    return 1 if failed else 0

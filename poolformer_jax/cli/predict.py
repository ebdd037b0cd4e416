"""`predict`: the most probable labels of images."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from poolformer_jax.cli.arguments import add_dtype, add_weights, positive, starting_jax, waiting
from poolformer_jax.errors import MissingFileError
from poolformer_jax.fields import is_local

NAME = "predict"
HELP = "Print the most probable labels of images."
EXAMPLE = """  python -m poolformer_jax predict cat.jpg dog.png --weights runs/digits/model
  python -m poolformer_jax predict photographs/ --json > labels.jsonl

Exit code 0 if every image was classified, 1 if one could not be read; the
others are printed anyway."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="an image file, or a folder of them")
    add_weights(parser)
    parser.add_argument(
        "--top-k", type=positive, default=5, metavar="K", help="labels per image (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per image and line")
    parser.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="images computed at once (default: %(default)s)"
    )
    add_dtype(parser)
    parser.add_argument(
        "--compilation-cache", metavar="FOLDER", help="keep compiled programs there, for a faster next start"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints predictions as they are ready; returns the exit code."""
    paths = list(_files(arguments.images))
    with starting_jax():
        from poolformer_jax.images import ImageError, printable
        from poolformer_jax.inference import ImageClassifier
    with waiting(f"Loading {arguments.weights}"):
        classifier = ImageClassifier.from_pretrained(
            arguments.weights,
            dtype=arguments.dtype,
            batch_size=min(arguments.batch_size, max(len(paths), 1)),
            compilation_cache_dir=arguments.compilation_cache,
        )
    results = classifier.stream(paths, arguments.top_k)
    failed = 0
    for number, path in enumerate(paths, start=1):
        with waiting(f"Classifying image {number} of {len(paths)}"):
            result = next(results)
        if isinstance(result, ImageError):
            failed += 1
            print(f"error: {printable(path)}: {result}", file=sys.stderr)
            if arguments.json:
                print(json.dumps({"image": str(path), "error": str(result)}))
        elif arguments.json:
            print(json.dumps({"image": str(path), "predictions": [prediction._asdict() for prediction in result]}))
        else:
            print(printable(path))
            for label, probability in result:
                print(f"  {100 * probability:5.1f} %  {label}")
    return 1 if failed else 0


def _files(names: list[str]) -> Iterator[Path | str]:
    """The given files, and for a folder the image files in it, sorted by name (no subfolders)."""
    for name in names:
        path = Path(name)
        if not path.is_dir():
            yield path if is_local(name) else name  # a Path drops one of the slashes of https://
            continue
        from poolformer_jax.images import image_suffixes

        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in image_suffixes() and file.is_file())
        if not inside:
            hint = " Its subfolders are not searched." if any(file.is_dir() for file in path.iterdir()) else ""
            raise MissingFileError(f"The folder {name} has no image file. Expected at least one.{hint}")
        yield from inside

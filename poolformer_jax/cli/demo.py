"""`demo`: a web page to try a network on."""

import argparse
from contextlib import suppress
from pathlib import Path

from poolformer_jax.cli.arguments import add_runtime, add_weights, files_of, port, source_options, starting_jax, waiting
from poolformer_jax.errors import MissingFileError

NAME = "demo"
HELP = "Serve a web page that shows the labels of a picture, with Grad-CAM."
EXAMPLE = """  python -m poolformer_jax demo --weights runs/digits/model

Needs: pip install -e '.[demo]'. Ctrl-C ends it."""
_MOST_SAMPLES = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_weights(parser)
    add_runtime(parser)
    parser.add_argument(
        "--samples",
        metavar="FOLDER",
        help="offer the pictures in this folder (default: examples beside a model folder, where train writes some)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (default: this machine only)")
    parser.add_argument("--port", type=port, help="port to serve on (default: the first free one from 7860)")


def run(arguments: argparse.Namespace) -> int:
    """Serves the page until Ctrl-C; returns the exit code."""
    samples = pictures_to_try(arguments)
    with starting_jax():
        from poolformer_jax.cli.demo_page import build_page, serve
        from poolformer_jax.inference import GradCam, ImageClassifier
        from poolformer_jax.weights import build_model, open_model
    with waiting(f"Loading {arguments.weights}"):
        opened = open_model(arguments.weights, **source_options(arguments))
        model, variables = build_model(opened)
        classifier = ImageClassifier(
            model.config, variables, opened.image_processor, batch_size=1, runtime=arguments.runtime
        )
        cam = GradCam(model.config, variables, opened.image_processor)
        page = build_page(classifier, cam, f"PoolFormer: {arguments.weights}", samples=samples)
    serve(page, arguments.host, arguments.port)
    return 0


def pictures_to_try(arguments: argparse.Namespace) -> list[Path]:
    """The pictures to offer, at most twelve."""
    files: list[Path | str] = []
    if arguments.samples is not None:
        files = files_of(arguments.samples)
    elif (model := Path(arguments.weights).expanduser()).is_dir():
        examples = model.resolve().parent / "examples"
        with suppress(MissingFileError):
            files = files_of(str(examples)) if examples.is_dir() else []
    return [Path(file) for file in files[:_MOST_SAMPLES]]

"""`demo`: a web page to try a network on."""

import argparse

from poolformer_jax.cli.arguments import add_weights, network_options, port, starting_jax, waiting

NAME = "demo"
HELP = "Serve a web page that shows the labels of a picture, with Grad-CAM."
EXAMPLE = """  python -m poolformer_jax demo --weights runs/digits/model

Needs: pip install -e '.[demo]'. Ctrl-C ends it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_weights(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (default: this machine only)")
    parser.add_argument("--port", type=port, help="port to serve on (default: the first free one from 7860)")


def run(arguments: argparse.Namespace) -> int:
    """Serves the page until Ctrl-C; returns the exit code."""
    with starting_jax():
        from poolformer_jax.cli.demo_page import build_page, serve
        from poolformer_jax.inference import GradCam, ImageClassifier
        from poolformer_jax.weights import build_model, open_model
    with waiting(f"Loading {arguments.weights}"):
        opened = open_model(arguments.weights, **network_options(arguments))
        model, variables = build_model(opened)
        classifier = ImageClassifier(model.config, variables, opened.image_processor, batch_size=1)
        cam = GradCam(model.config, variables, opened.image_processor)
        page = build_page(classifier, cam, f"PoolFormer: {arguments.weights}")
    serve(page, arguments.host, arguments.port)
    return 0
